"""Sweeps killed at random times, in one process, in workers, on submitit's executor and under papermill, end as if
nothing had happened. `LICO_KILLS=500 pytest -m slow tests/test_kills.py` kills 500 times."""
import functools, os, random, signal, subprocess, sys, textwrap, time
from pathlib import Path

import nbformat, pandas as pd, pytest, torch

from lico.experiments import Run
from lico.training import load_checkpoint
from test_processes import BIN, JOB, alive, children, gone

KILLS = int(os.environ.get('LICO_KILLS', 20))
RUNS = [Run(labels=40, backbone='wrn_10_1', method=method, seed=1, steps=25, evaluations=5, options=dict(
    n_context=2, ema=0.9)) for method in ('CE', 'LICO')]
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
    command = [f'{BIN}/papermill', 'sweep.ipynb', 'out.ipynb'] if kind == 'papermill' else [sys.executable, 'sweep.py']
    log = open(folder/'log', 'a', encoding='utf-8')
    return subprocess.Popen(command, cwd=folder, env={**os.environ, 'LICO_ROOT': str(folder)}, stdout=log, stderr=log)


def outcome(folder):
    "Weights, predictions and logs of all runs."
    out = {}
    for run in sorted(folder.glob('data/runs/*')):
        assert (run/'record.json').exists() and not (run/'checkpoint.safetensors').exists()
        tensors = {f'{name} {k}': v for name in ('model', 'predictions')
                   for k, v in load_checkpoint(run/f'{name}.safetensors')[0].items()}
        out[run.name] = tensors, pd.read_csv(run/'log.csv').drop(columns='seconds')
    return out


@functools.cache
def reference(threads, folder):
    folder = Path(f'{folder}/reference-{threads}')
    folder.mkdir()
    began = time.time()
    assert begin('process', threads, folder).wait() == 0
    return outcome(folder), time.time() - began


@pytest.mark.slow
@pytest.mark.parametrize('kind', SWEEP)
@pytest.mark.parametrize('threads', [1, 2])
def test_killed_at_random(kind, threads, tmp_path, tmp_path_factory):
    "Any process of the sweep, at any time, again and again until enough were killed; the last sweep ends what is left."
    if kind == 'submitit': pytest.importorskip('submitit')
    expected, seconds = reference(threads, tmp_path_factory.getbasetemp())
    chance, left, killed = random.Random(f'{kind} {threads}'), [], 0
    while killed < max(1, KILLS//8):
        (folder := tmp_path/f'after-{killed}').mkdir(exist_ok=True)
        for _ in range(3):
            p = begin(kind, threads, folder)
            time.sleep(chance.uniform(0, 1.5*seconds))
            left += (family := [p.pid, *children(p.pid)])
            if p.poll() is not None: break
            os.kill(chance.choice(alive(family)), signal.SIGKILL)
            killed += 1
            try: p.wait(chance.uniform(0, seconds))  # it may go on without its worker
            except subprocess.TimeoutExpired: p.kill(); p.wait()
        assert begin(kind, threads, folder).wait() == 0, (folder/'log').read_text(encoding='utf-8')[-3000:]
        found = outcome(folder)
        assert found.keys() == expected.keys()
        for (tensors, log), (other, other_log) in zip(expected.values(), found.values()):
            assert tensors.keys() == other.keys() and all(torch.equal(tensors[k], other[k]) for k in tensors)
            pd.testing.assert_frame_equal(log, other_log, check_exact=True)
    assert gone(left, 60)
    print(f'{kind}, {threads} threads: {killed} killed')
