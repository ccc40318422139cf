"""Sweeps killed at random times, in one process, in workers, on submitit's executor and under papermill, end as if
nothing had happened. `LICO_KILLS=500 pytest -m slow tests/test_kills.py` kills 500 times; the first three of each kind
while whole programs start, the others in programs that are forked from this one, which has imported all they need."""
import contextlib, functools, os, random, signal, subprocess, sys, textwrap, time
from pathlib import Path

import nbformat, pandas as pd, pytest, torch

from lico.experiments import Run, find_encoder, load_data
from lico.training import load_checkpoint
from test_processes import JOB, gone
from warm import warm

PROGRAMS = ['papermill.cli', 'ipykernel.kernelapp', 'submitit.core._submit', 'lico.evidence.store']
KILLS = int(os.environ.get('LICO_KILLS', 20))
RUNS = [Run(labels=20, validation=20, backbone='wrn_10_1', method=method, seed=1, steps=8, evaluations=2, options=dict(
    n_context=2, ema=0.9, batch_size=10)) for method in ('CE', 'LICO')]
SETUP = textwrap.dedent('''
    import functools, os, sys, warnings
    warnings.simplefilter('ignore')
    from lico import experiments, training
    from lico.experiments import *
    from lico.together import Workers
    experiments.fit = functools.partial(training.fit, checkpoint_seconds=0)
    runs = [Run(**{**vars(r), 'threads': THREADS}) for r in RUNS]
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


def begin(kind, threads, folder):
    "Start a sweep in a folder."
    code = SETUP.replace('THREADS', str(threads)).replace('RUNS', repr(RUNS)) + SWEEP[kind]
    (folder/'job.py').write_text(JOB.replace('time.sleep(0.3)', ''), encoding='utf-8')
    (folder/'sweep.py').write_text(code, encoding='utf-8')
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata=dict(kernelspec=dict(
        name='python3', display_name='python3'))), folder/'sweep.ipynb')
    what = ['-m', 'papermill', 'sweep.ipynb', 'out.ipynb'] if kind == 'papermill' else ['sweep.py']
    with open(folder/'log', 'a', encoding='utf-8') as log:
        return subprocess.Popen([sys.executable, *what], cwd=folder, env={**os.environ, 'LICO_ROOT': str(folder)},
                                stdout=log, stderr=log)


def outcome(folder):
    "Weights, predictions and logs of all runs; nothing else is left in their folders."
    out = {}
    for run in sorted(folder.glob('data/runs/*')):
        assert {o.name for o in run.iterdir()} == {'lock', 'log.csv', 'model.safetensors', 'predictions.safetensors',
                                                   'record.json', 'spec.json'}
        tensors = {f'{name} {k}': v for name in ('model', 'predictions')
                   for k, v in load_checkpoint(run/f'{name}.safetensors')[0].items()}
        out[run.name] = tensors, pd.read_csv(run/'log.csv').drop(columns='seconds')
    return out


def whole(kind, threads, folder):
    "The outcome of a sweep that nobody disturbs, and its seconds."
    began = time.time()
    folder.mkdir()
    assert begin(kind, threads, folder).wait() == 0, (folder/'log').read_text(encoding='utf-8')[-3000:]
    return outcome(folder), time.time() - began


@functools.cache
def reference(threads, folder): return whole('process', threads, Path(f'{folder}/reference-{threads}'))


def compare(expected, found):
    assert found.keys() == expected.keys() and len(found) == len(RUNS)
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


def kill_at_random(kind, threads, folder, chance, seconds):
    "Three times any process of a sweep, at any time; then it may end. How many were killed."
    killed = 0
    for _ in range(3):
        p = begin(kind, threads, folder)
        time.sleep(chance.uniform(0, 1.2*seconds))
        if p.poll() is not None: break
        with contextlib.suppress(ProcessLookupError, IndexError):  # it has just ended, or is not yet there
            os.kill(chance.choice(inside(folder)), signal.SIGKILL)
            killed += 1
        try: p.wait(chance.uniform(0, seconds))  # it may go on without its worker
        except subprocess.TimeoutExpired:
            p.kill(), p.wait()
            killed += 1
    assert begin(kind, threads, folder).wait() == 0, (folder/'log').read_text(encoding='utf-8')[-3000:]
    return killed


@pytest.mark.slow
@pytest.mark.parametrize('kind', SWEEP)
@pytest.mark.parametrize('threads', [1, 2])
def test_killed_at_random(kind, threads, tmp_path, tmp_path_factory):
    "Again and again until enough were killed; nothing is left alive, and nothing but the results."
    for module in PROGRAMS: pytest.importorskip(module)
    find_encoder('minilm'), load_data(RUNS[0])  # for programs that are forked
    expected, seconds = reference(threads, tmp_path_factory.getbasetemp())
    chance, killed = random.Random(f'{kind} {threads}'), []
    while sum(killed) < max(1, KILLS//8):
        with warm() if killed else contextlib.nullcontext():
            if len(killed) == 1:
                found, seconds = whole(kind, threads, tmp_path/'whole')
                compare(expected, found)
            (folder := tmp_path/f'after-{sum(killed)}').mkdir(exist_ok=True)
            killed.append(kill_at_random(kind, threads, folder, chance, seconds))
        compare(expected, outcome(folder))
        assert gone(inside(folder), 60) and not [*folder.rglob('*.tmp')]
        print(f'{kind}, {threads} threads: {sum(killed)} killed', flush=True)
