#!/usr/bin/env python3
"""bring.py FOLDER BLOCK ...: records and rows of maps in FOLDER, an unpacked results.tgz, to data/runs and figures.

Whole seeds alone: one that lacks an arm is said and left out, and maps of a seed count when all its arms have them."""
import shutil, sys
from pathlib import Path

import pandas as pd

from lico.evidence.programme import BLOCKS, arm_name
from lico.evidence.store import read_results, read_scores, rows_of, write_results
from lico.records import read_record, run_of
from lico.experiments import runs_folder


def whole(found, arms):
    "Of (seed, arm) -> thing those of seeds with all arms."
    seeds = sorted({s for s, _ in found})
    for s in (gone := [s for s in seeds if not all((s, a) in found for a in arms)]): print(f'  seed {s} is not whole')
    return {k: found[k] for s in seeds if s not in gone for a in arms for k in [(s, a)]}


if __name__ == '__main__':
    source = Path(sys.argv[1])
    records = [r for o in (source/'root'/'data'/'runs').iterdir() if (r := read_record(o))]
    for name in sys.argv[2:]:
        b, out = BLOCKS[name], Path('figures')/f'language-{name}'
        asked = range(b.first, b.first + b.seeds)
        own = [r for r in records if (r['dataset'], r['run']['labels']) == (b.dataset, b.labels)]
        print(name, 'runs')
        mine = whole({(r['run']['seed'], arm_name(run_of(r))): r for r in own if r['run']['seed'] in asked}, b.arms)
        kinds = {(r['run']['seed'], r['stamp']['hardware']) for r in mine.values()}
        if len(kinds) > len({s for s, _ in mine}):
            raise ValueError(f"arms of one seed are of different machines: {sorted(kinds)}")
        for r in mine.values():
            shutil.copytree(source/'root'/'data'/'runs'/r['id'], runs_folder()/r['id'], dirs_exist_ok=True)
        rows = rows_of([*mine.values()], arm_name=arm_name, profile='paper').astype(object)
        maps = {(s, a): o for s, a in mine if (o := source/'work'/'maps'/f'{name}-{s}-{a}').is_dir()}
        print(name, 'maps')
        maps = whole(maps, b.arms)
        scored = [read_results(o).astype(object) for o in maps.values()]
        per_image = pd.concat([read_scores(o) for o in maps.values()]) if maps else None
        seen = pd.concat(scored).id.unique() if maps else ()
        write_results(out, pd.concat([rows[~rows.id.isin(seen)], *scored]), per_image, keep=True)
        print(f'{out}: {len(mine)} runs, {len(maps)} with maps')
