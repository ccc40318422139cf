#!/usr/bin/env python3
"""pack.py BLOCK=FOLDER[:SEEDS] ...: into .gpu, what a bare GPU machine needs to run blocks of the programme.

Images as lossless mosaics (files stay files), and MiniLM without the words that no class name has. See README.md."""
import io, lzma, pickle, sys
from pathlib import Path

import numpy as np, torch
from PIL import Image

from lico.data import Files, box_masks
from lico.evidence.cases import _in_turn
from lico.evidence.programme import BLOCKS, block_runs
from lico.experiments import load_data
from lico.runs import find_encoder

OUT = Path('.gpu')
FIELDS = 'name', 'class_names', 'image_size', 'flip', 'mean', 'std', 'digest', 'crop'


def mosaic(x):
    "uint8 images [n, 3, S, S], a hundred a row, as lossless WebP."
    n, _, S, _ = x.shape
    full = np.zeros((-(-n//100)*100, S, S, 3), np.uint8)
    full[:n] = x.permute(0, 2, 3, 1).numpy()
    whole = full.reshape(-1, 100, S, S, 3).swapaxes(1, 2).reshape(-1, 100*S, 3)
    Image.fromarray(whole).save(out := io.BytesIO(), 'WEBP', lossless=True, quality=100)
    return out.getvalue()


def pack_data(name, folder, seeds):
    "The data of a block's runs: `test` and, by seed, `train`, each content and labels."
    first = block_runs(name, f'folder:{folder}', seeds[:1])[0]
    data = load_data(first)
    packed = {k: getattr(data, k) for k in FIELDS}
    if isinstance(data.train, Files):
        packed |= {part: (o.paths, o.y.numpy()) for part, o in (('train', data.train), ('test', data.test))}
        chosen = _in_turn(data.test.y, BLOCKS[name].images)
        packed |= dict(chosen=chosen.tolist(), boxes=box_masks(first.dataset, data, chosen))
    else:
        train = {s: load_data(block_runs(name, f'folder:{folder}', [s])[0]).train for s in seeds}
        packed |= dict(test=(mosaic(data.test.x), data.test.y.numpy()),
                       train={s: (mosaic(o.x), o.y.numpy()) for s, o in train.items()})
    (OUT/f'pack{name}').mkdir(parents=True, exist_ok=True)
    (OUT/f'pack{name}'/'data.xz').write_bytes(lzma.compress(pickle.dumps(packed), preset=0))
    return data.class_names


def planes(raw):
    "Bytes of float32 numbers, the first, second, … byte of each together; the upper two compress."
    cut = np.frombuffer(raw, np.uint8)[:len(raw)//4*4].reshape(-1, 4).T
    parts = [lzma.compress(np.ascontiguousarray(p).tobytes()) if k >= 2 else p.tobytes() for k, p in enumerate(cut)]
    return pickle.dumps([*parts, raw[len(raw)//4*4:]])


def pack_encoder(names):
    "MiniLM with the words of these names alone, what `invent_words` asks of its whole table, and its digest."
    from safetensors.torch import save
    (enc, digest), out = find_encoder('minilm'), OUT/'encoder'
    ids = {n: enc.name_ids(n).tolist() for n in names}
    kept = sorted({*enc.begin.tolist(), *enc.end.tolist(), *sum(ids.values(), [])})
    place, (std, mean) = {o: i for i, o in enumerate(kept)}, torch.std_mean(enc.table.weight, 0)
    state = {k: v.contiguous() for k, v in enc.model.state_dict().items()}
    state['embeddings.word_embeddings.weight'] = enc.table.weight[kept].clone()
    out.mkdir(parents=True, exist_ok=True)
    (out/'planes').write_bytes(planes(save(state, metadata=dict(format='pt'))))
    enc.model.config.update(dict(vocab_size=len(kept), pad_token_id=0))
    enc.model.config.save_pretrained(out)
    facts = dict(digest=digest, std=std.numpy(), mean=mean.numpy(), begin=place[int(enc.begin)],
                 end=place[int(enc.end)], ids={n: [place[i] for i in o] for n, o in ids.items()})
    (out/'facts').write_bytes(pickle.dumps(facts))


if __name__ == '__main__':
    names = []
    for asked in sys.argv[1:]:
        name, _, where = asked.partition('=')
        folder, _, seeds = where.partition(':')
        b = BLOCKS[name]
        seeds = [int(s) for s in seeds.split(',')] if seeds else [*range(b.first, b.first + b.seeds)]
        names += pack_data(name, Path(folder).resolve(), seeds)
    pack_encoder(list(dict.fromkeys(names)))
