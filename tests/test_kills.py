"""Sweeps killed at random times, in one process, in workers, on submitit's executor and under papermill, end as if
nothing had happened. `LICO_KILLS=500 pytest -m slow tests/test_kills.py` kills 500 times; the first few of each kind
in whole programs, the others in programs that are forked from this one, which has imported all they need."""
import contextlib, functools, os, random, signal, subprocess, sys, textwrap, time
from pathlib import Path

import nbformat, pandas as pd, pytest, torch

from lico.experiments import Run, load_data
from lico.runs import find_encoder
from lico.text import load_text_encoder
from lico.shipping import load_checkpoint
from test_processes import JOB, gone
from warm import warm

PROGRAMS = ['papermill.cli', 'ipykernel.kernelapp', 'submitit.core._submit', 'lico.evidence.store']
KILLS = int(os.environ.get('LICO_KILLS', 20))
SETUP = textwrap.dedent('''
    import functools, os, sys, warnings
    warnings.simplefilter('ignore')
    from lico import records, training
    from lico.experiments import *
    from lico.together import Workers
    records.fit = functools.partial(training.fit, checkpoint_seconds=0)
    runs = RUNS
''')
SWEEP = dict(
    process='sweep(runs, progress=False)',
    workers="if __name__ == '__main__':\n"
            "    with Workers(2) as pool: sweep(runs, progress=False, executor=pool, retries=9)",
    submitit="from submitit import LocalExecutor\n"
             "executor = LocalExecutor('jobs', python=f'{sys.executable} job.py')\n"
             "executor.update_parameters(timeout_min=60)\nsweep(runs, progress=False, executor=executor, retries=9)",
    papermill='from lico.evidence.store import processes\n'
              'with processes(1): sweep(runs, progress=False)')


@functools.cache
def runs_of(threads, folder):
    "A baseline and LICO with a small text encoder in that folder; four epochs, after each of which it is saved."
    from transformers import BertConfig, BertModel
    if not folder.exists():
        BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32),
                  add_pooling_layer=False).save_pretrained(folder)
        load_text_encoder('minilm').tokenizer.save_pretrained(folder)
    return tuple(Run(labels=20, validation=20, backbone='wrn_10_1', method=method, seed=1, steps=8, evaluations=2,
                     threads=threads, text_encoder=str(folder), options=dict(n_context=2, ema=0.9, batch_size=10))
                 for method in ('CE', 'LICO'))


def begin(kind, runs, folder):
    "Start a sweep in a folder."
    code = SETUP.replace('RUNS', repr(runs)) + SWEEP[kind]
    (folder/'job.py').write_text(JOB.replace('time.sleep(0.3)', ''), encoding='utf-8')
    (folder/'sweep.py').write_text(code, encoding='utf-8')
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata=dict(kernelspec=dict(
        name='python3', display_name='python3'))), folder/'sweep.ipynb')
    what = ['-m', 'papermill', 'sweep.ipynb', 'out.ipynb'] if kind == 'papermill' else ['sweep.py']
    with open(folder/'log', 'a', encoding='utf-8') as log:
        return subprocess.Popen([sys.executable, *what], cwd=folder, env={**os.environ, 'LICO_ROOT': str(folder)},
                                stdout=log, stderr=log)


def finish(kind, runs, folder):
    "Let a sweep end; weights, predictions and logs of all runs, beside which nothing is left in their folders."
    assert begin(kind, runs, folder).wait() == 0, (folder/'log').read_text(encoding='utf-8')[-3000:]
    out = {}
    for run in sorted(folder.glob('data/runs/*')):
        assert {o.name for o in run.iterdir()} == {'lock', 'log.csv', 'model.safetensors', 'predictions.safetensors',
                                                   'record.json', 'spec.json'}
        tensors = {f'{name} {k}': v for name in ('model', 'predictions')
                   for k, v in load_checkpoint(run/f'{name}.safetensors')[0].items()}
        out[run.name] = tensors, pd.read_csv(run/'log.csv').drop(columns='seconds')
    assert len(out) == len(runs) and not [*folder.rglob('*.tmp')]
    return out


@functools.cache
def undisturbed(kind, runs, folder, programs):
    "The outcome of a sweep that nobody kills, and its seconds."
    began = time.time()
    folder.mkdir()
    with programs(): return finish(kind, runs, folder), time.time() - began


def compare(expected, found):
    assert found.keys() == expected.keys()
    for (tensors, log), (other, other_log) in zip(expected.values(), found.values()):
        assert tensors.keys() == other.keys() and all(torch.equal(tensors[k], other[k]) for k in tensors)
        pd.testing.assert_frame_equal(log, other_log, check_exact=True)


def inside(folder):
    "The processes at work in a folder."
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            if os.readlink(p/'cwd') == str(folder): found.append(int(p.name))
    return found


def kill_at_random(kind, runs, folder, chance, seconds):
    """Three times any process of a sweep, at any time, and the sweep itself if it then goes on for long; the kills, and
    the seconds, fewer if it ended before."""
    killed = 0
    for _ in range(3):
        p = begin(kind, runs, folder)
        time.sleep(chance.uniform(0, 1.2*seconds))
        if p.poll() is not None: return killed, seconds if killed else 0.7*seconds
        with contextlib.suppress(ProcessLookupError, IndexError):  # it has just ended, or is not yet there
            os.kill(chance.choice(inside(folder)), signal.SIGKILL)
            killed += 1
        try: p.wait(chance.uniform(0, seconds))  # it may go on without its worker
        except subprocess.TimeoutExpired:
            p.kill(), p.wait()
            killed += 1
    return killed, seconds


@pytest.mark.slow
@pytest.mark.parametrize('kind', SWEEP)
@pytest.mark.parametrize('threads', [1, 2])
def test_killed_at_random(kind, threads, tmp_path, tmp_path_factory):
    "Again and again until enough were killed; nothing is left alive, and nothing but the results."
    for module in PROGRAMS: pytest.importorskip(module)
    base, programs = tmp_path_factory.getbasetemp(), contextlib.nullcontext if threads == 1 else warm
    runs = runs_of(threads, base/'encoder')
    load_data(runs[0]), find_encoder(str(base/'encoder'))  # for programs that are forked
    expected, seconds = undisturbed('process', runs, base/f'reference-{threads}', programs)
    chance, killed = random.Random(f'{kind} {threads}'), []
    while sum(killed) < max(1, KILLS//8):
        with programs():
            (folder := tmp_path/str(len(killed))).mkdir()
            n, seconds = kill_at_random(kind, runs, folder, chance, seconds)
            killed.append(n)
            compare(expected, finish(kind, runs, folder))
        assert gone(inside(folder), 60)
        print(f'{kind}, {threads} threads: {sum(killed)} killed', flush=True)
        if len(killed) % 8 == 1: seconds = undisturbed(kind, runs, tmp_path/f'whole-{len(killed)}', programs := warm)[1]
