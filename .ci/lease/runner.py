#!/usr/bin/env python3
"""runner.py JOB ...: processes that share one GPU do the runs of the programme, in order, then score maps.

A job is B5 (block B, seed 5, all arms) or mB5 (the maps of these networks). It waits for its pack's READY, and is not
begun when it would not end before the time in the file `deadline`. See README.md."""
import json, lzma, multiprocessing, os, pickle, re, sys, time, traceback
from pathlib import Path

PACKS, WORK = Path(os.environ.get('PACKS', '/tmp/packs')), Path(os.environ.get('WORK', '/tmp/work'))
N, STEPS = int(os.environ.get('PROCESSES', 16)), os.environ.get('STEPS')  # STEPS: of a rehearsal on a CPU
FIRST_GUESS = 200.  # seconds of a run, until one of its block has ended


def say(*words):
    with open(WORK/'log', 'a') as f: f.write(f'{time.time():.0f} {" ".join(map(str, words))}\n')


class Packed:
    "The packs, each opened once by a process."
    def __init__(self): self.seen = {}

    def __getitem__(self, name):
        if name not in self.seen:
            self.seen[name] = pickle.loads(lzma.decompress((PACKS/f'pack{name}/data.xz').read_bytes()))
        return self.seen[name]

    def of(self, r):
        "The pack of a run: of its dataset and labels, with its seed."
        from lico.evidence.programme import BLOCKS
        for name, b in BLOCKS.items():
            fits = (b.dataset, b.labels) == (r.dataset.split('/')[-1], r.labels) and (PACKS/f'pack{name}').exists()
            if fits and (type(train := self[name]['train']) is tuple or r.seed in train): return name

    def images(self, name, content, y):
        "Images of a mosaic, or files below WORK."
        import io, numpy as np, torch
        from PIL import Image
        from lico.data import Files, Images
        if not isinstance(content, bytes): return Files(WORK/'files'/name, content, torch.from_numpy(y))
        Image.MAX_IMAGE_PIXELS, S = None, self[name]['image_size']
        m = np.asarray(Image.open(io.BytesIO(content)))
        x = m.reshape(-1, S, 100, S, 3).swapaxes(1, 2).reshape(-1, S, S, 3)[:len(y)]
        return Images(torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))), torch.from_numpy(y))

    def data(self, r):
        from lico.data import Data
        p = self[name := self.of(r)]
        train, key = p['train'] if type(p['train']) is tuple else p['train'][r.seed], ('test', name)
        if key not in self.seen: self.seen[key] = self.images(name, *p['test'])
        rest = [p[k] for k in ('class_names', 'image_size', 'flip', 'mean', 'std', 'digest', 'crop')]
        return Data(p['name'], self.images(name, *train), self.seen[key], *rest)


def encoder(facts):
    "The packed MiniLM."
    import transformers
    from lico.encoders import BERTText
    class Tokenizer:
        cls_token_id, sep_token_id, unk_token_id = facts['begin'], facts['end'], None
        def __call__(self, text, **options): return dict(input_ids=facts['ids'][text])
    model = transformers.BertModel.from_pretrained(PACKS/'encoder', local_files_only=True, add_pooling_layer=False)
    enc = BERTText(model.float(), Tokenizer())
    enc.digest = lambda: facts['digest']
    return enc


def use_packs(packed):
    "Packs in the place of datasets, boxes, decoded files and the text encoder."
    import torch, lico.batches, lico.experiments, lico.records, lico.runs, lico.text
    from lico.evidence import cases, store
    facts = pickle.loads((PACKS/'encoder/facts').read_bytes())
    enc, std_mean, read, decoded = encoder(facts), torch.std_mean, lico.batches.read_image, {}
    def whole_table(t, *where):  # `invent_words` asks for the moments of all words
        if t.shape == enc.table.weight.shape: return torch.from_numpy(facts['std']), torch.from_numpy(facts['mean'])
        return std_mean(t, *where)
    def read_once(folder, path):
        if path not in decoded: decoded[path] = read(folder, path).convert('RGB')
        return decoded[path]
    torch.std_mean, lico.batches.read_image = whole_table, read_once
    for m in (lico.runs, lico.records): m.find_encoder = lambda name: (enc, facts['digest'])
    for m in (lico.runs, lico.records, lico.experiments, cases, store): m.load_data = packed.data
    def boxes(r, data, chosen):
        p, n = packed[packed.of(r)], len(chosen)
        return tuple(p['boxes'][:n]) if p.get('chosen', ())[:n] == chosen.tolist() else None
    cases._boxes = boxes


def run_of(name, seed, arm):
    from lico.evidence.programme import BLOCKS, block_runs
    fixed = dict(steps=int(STEPS)) if STEPS else {}
    return block_runs(name, f'folder:/path/to/{BLOCKS[name].dataset}', [seed], **fixed)[BLOCKS[name].arms.index(arm)]


def score_maps(name, seed, arm):
    "Rows and scores of one network, in a folder of their own."
    from types import SimpleNamespace
    from lico.evidence.programme import BLOCKS, arm_name
    from lico.evidence.store import collect
    b = BLOCKS[name]
    rows = collect(SimpleNamespace(out=WORK/'maps'/f'{name}-{seed}-{arm}', workers=1, stored=None, protocol='paper',
                                   saliency=['grad-cam', 'random'], metrics=b.metrics, also=b.also, stand_in=None,
                                   test_images=8 if STEPS else b.images, saliency_options='', batch_size=232),
                   [run_of(name, seed, arm)], arm_name=arm_name)
    return dict(id=rows.id[0])


def do(kind, name, seed, arm):
    from lico.records import run
    began, job = time.time(), f'{kind}-{name}-{seed}-{arm}'
    try:
        out = run(run_of(name, seed, arm), progress=False) if kind == 'run' else score_maps(name, seed, arm)
        (WORK/'done'/job).write_text(json.dumps(dict(seconds=time.time() - began, id=out['id'])))
        say('done', job, f'{time.time() - began:.0f}')
    except Exception:
        (WORK/'done'/f'{job}.failed').touch()
        say('FAILED', job, ' | '.join(traceback.format_exc().splitlines()[-3:]))


def may_begin(kind, name, seed, arm):
    "True, `None` for not yet, or False for no more."
    if not (PACKS/f'pack{name}/READY').exists(): return None
    network = WORK/'done'/f'run-{name}-{seed}-{arm}'
    if kind == 'maps' and Path(f'{network}.failed').exists(): return False
    if kind == 'maps' and not network.exists(): return None
    known = [json.loads(o.read_text() or '{}').get('seconds', 0) for o in (WORK/'done').glob(f'{kind}-{name}-*')]
    return bool(STEPS) or time.time() + 1.05*max(known, default=FIRST_GUESS) < float((WORK/'deadline').read_text())


def work(jobs):
    import torch
    torch.set_num_threads(1)
    use_packs(Packed())
    say('ready')
    while time.time() < float((WORK/'deadline').read_text()):
        waiting = False
        for job in jobs:
            claim = WORK/'claims'/'-'.join(map(str, job))
            if claim.exists() or not (may := may_begin(*job)):
                waiting |= not claim.exists() and may is None
                continue
            try: claim.touch(exist_ok=False)
            except FileExistsError: continue
            do(*job)
            waiting = True
            break
        else:
            if not waiting: break
            time.sleep(.5)
    say('ended')


if __name__ == '__main__':
    from lico.evidence.programme import BLOCKS
    asked = [re.fullmatch(r'(m?)([A-Z])(\d+)', o).groups() for o in sys.argv[1:]]
    jobs = [('maps' if m else 'run', name, int(seed), arm) for m, name, seed in asked for arm in BLOCKS[name].arms]
    for o in ('claims', 'done', 'maps'): (WORK/o).mkdir(parents=True, exist_ok=True)
    processes = [multiprocessing.get_context('spawn').Process(target=work, args=(jobs,)) for _ in range(N)]
    for p in processes: p.start()
    for p in processes: p.join()
    say('all ended')
