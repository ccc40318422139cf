"Notebooks as a user runs them: papermill from any folder, parameters refused or obeyed, tags that survive cleaning."
import os, shutil, subprocess, sys
from pathlib import Path

import nbformat, pandas as pd, pytest

from lico.config import root
from lico.fidelity import changes
from lico.tables import TABLES

TOP = root()
BIN = Path(sys.executable).parent


def papermill(notebook, *args, cwd, lico_root, output=None):
    env = {**os.environ, 'LICO_ROOT': str(lico_root), 'PATH': f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run([BIN/'papermill', TOP/'nbs'/notebook, *([output] if output else []), *args], cwd=cwd, env=env, capture_output=True, text=True)


def test_table3_smoke_from_any_folder(tmp_path):
    p = papermill('table3.ipynb', '-p', 'profile', 'smoke', cwd=tmp_path, lico_root=tmp_path)
    assert p.returncode == 0, p.stderr[-3000:]
    assert nbformat.reads(p.stdout, 4).cells, 'with no output path papermill writes the notebook to standard output'
    out = tmp_path/'data'/'smoke'/'table3'
    assert sorted(f.name for f in out.iterdir()) == ['figure.png', 'figure.svg', 'results.csv', 'table.md'] and not (tmp_path/'figures').exists()
    df = pd.read_csv(out/'results.csv')
    assert df.method.tolist() == ['CE', 'LICO'] and (df.profile == 'smoke').all() and 'digits (for CIFAR-10)' in (out/'table.md').read_text()
    assert 'profile smoke' in p.stdout and 'minilm' in p.stdout


def test_table3_on_a_folder(tmp_path):
    "-p datasets folder:PATH, labels, seeds, backbones and out do what they say, and what was run before is not run again."
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    images, target = load_digits(return_X_y=True)
    for i in range(300):
        path = tmp_path/'images'/('train' if i < 200 else 'test')/f'digit {target[i]}'/f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((images[i].reshape(8, 8)*15.9).astype(np.uint8)).resize((16, 16)).save(path)
    args = ['-p', 'datasets', f'folder:{tmp_path}/images', '-p', 'labels', '20', '-p', 'seeds', '0,1', '-p', 'backbones', 'wrn_10_1', '-p', 'steps', '1',
            '-p', 'out', f'{tmp_path}/out', '-p', 'profile', 'smoke']
    p = papermill('table3.ipynb', *args, cwd=tmp_path, lico_root=tmp_path, output='x.ipynb')
    assert p.returncode == 0, p.stderr[-3000:]
    df = pd.read_csv(tmp_path/'out'/'results.csv')
    assert sorted(df.seed) == [0, 0, 1, 1] and (df.labels == 20).all() and df.paper_dataset.isna().all()
    before = {f: f.stat().st_mtime for f in tmp_path.glob('data/runs/*/record.json')}
    assert papermill('table3.ipynb', *args, cwd=tmp_path, lico_root=tmp_path, output='x.ipynb').returncode == 0
    assert before == {f: f.stat().st_mtime for f in tmp_path.glob('data/runs/*/record.json')} and len(before) == 4


@pytest.mark.parametrize('name', ['table1', 'table8'])
def test_tables_of_maps_smoke(tmp_path, name):
    p = papermill(f'{name}.ipynb', '-p', 'profile', 'smoke', cwd=tmp_path, lico_root=tmp_path)
    assert p.returncode == 0, p.stderr[-3000:]
    out = tmp_path/'data'/'smoke'/name
    assert sorted(f.name for f in out.iterdir()) == ['figure.png', 'figure.svg', 'results.csv', 'scores.csv', 'table.md']
    df, per_image = pd.read_csv(out/'results.csv'), pd.read_csv(out/'scores.csv')
    assert {'CE', 'LICO'} <= set(df.method) and (df.profile == 'smoke').all() and df.measured_by.str.startswith('python -c').all()
    assert len(per_image) == df.images.sum() and set(df.saliency) == {'grad-cam', 'random'}


@pytest.mark.parametrize('n', [2, 4, 5, 6, 7, 9, 10, 11, 12, 13])
def test_tables_smoke(tmp_path, n):
    p = papermill(f'table{n}.ipynb', '-p', 'profile', 'smoke', cwd=tmp_path, lico_root=tmp_path)
    assert p.returncode == 0, p.stderr[-3000:]
    out = tmp_path/'data'/'smoke'/f'table{n}'
    assert {'figure.png', 'figure.svg', 'results.csv', 'table.md'} <= {f.name for f in out.iterdir()} <= {'figure.png', 'figure.svg', 'results.csv', 'table.md', 'scores.csv'}
    df = pd.read_csv(out/'results.csv')
    assert TABLES[n].reference in set(df.arm) and df.arm.nunique() > 1 and (df.profile == 'smoke').all() and f'Table {n} on digits' in (out/'table.md').read_text()


@pytest.mark.parametrize('n', range(3, 9))
def test_figures_smoke(tmp_path, n):
    p = papermill(f'figure{n}.ipynb', '-p', 'profile', 'smoke', cwd=tmp_path, lico_root=tmp_path)
    assert p.returncode == 0, p.stderr[-3000:]
    assert {'figure.png', 'figure.svg', 'results.csv', 'table.md'} <= {f.name for f in (tmp_path/'data'/'smoke'/f'figure{n}').iterdir()}


def test_fidelity_smoke(tmp_path):
    p = papermill('fidelity.ipynb', '-p', 'profile', 'smoke', cwd=tmp_path, lico_root=tmp_path)
    assert p.returncode == 0, p.stderr[-3000:]
    out = tmp_path/'data'/'smoke'/'fidelity'
    assert sorted(f.name for f in out.iterdir()) == ['figure.png', 'figure.svg', 'results.csv', 'table.md']
    df = pd.read_csv(out/'results.csv')
    assert (df.method == 'LICO').sum() == 1 + len(changes('repaired')), 'as the preset has it, and with each choice changed'
    assert (df.method == 'CE').sum() == 7, "as the presets train, with each of five changes, and all of the released code's training"
    assert all(choice in (out/'table.md').read_text() for choice, _ in changes('repaired'))


def test_paper_reads_what_is_stored(tmp_path):
    (tmp_path/'figures').mkdir()
    shutil.copytree(TOP/'figures'/'table3-digits', tmp_path/'figures'/'table3-digits')
    p = papermill('paper.ipynb', cwd=tmp_path, lico_root=tmp_path)
    assert p.returncode == 0, p.stderr[-3000:]
    df = pd.read_csv(tmp_path/'figures'/'paper'/'results.csv')
    assert (df.says != 'not measured').sum() == 6 and set(df.folder.dropna()) == {'table3-digits'} and not (tmp_path/'data').exists()


def test_study_smoke(tmp_path):
    p = papermill('study.ipynb', '-p', 'profile', 'smoke', cwd=tmp_path, lico_root=tmp_path)
    assert p.returncode == 0, p.stderr[-3000:]
    out = tmp_path/'data'/'smoke'/'study'
    assert sorted(f.name for f in out.iterdir()) == ['figure.png', 'figure.svg', 'results.csv', 'table.md']
    df = pd.read_csv(out/'results.csv')
    assert (df.validation == 100).all() and (df.seed >= 100).all() and len(df) <= 40


@pytest.mark.parametrize('folder', sorted(p.parent for p in (TOP/'figures').glob('*/results.csv')), ids=lambda p: p.name)
def test_committed_results_are_drawn_from_the_file_alone(tmp_path, folder):
    "In a root without data and without records, `-p stored only` gives the committed table, letter for letter."
    shutil.copytree(folder, tmp_path/'figures'/folder.name)
    (tmp_path/'figures'/folder.name/'table.md').unlink()
    p = papermill(f"{folder.name.split('-')[0]}.ipynb", '-p', 'stored', 'only', '-p', 'out', str(tmp_path/'figures'/folder.name), cwd=tmp_path, lico_root=tmp_path)
    assert p.returncode == 0, p.stderr[-3000:]
    assert (tmp_path/'figures'/folder.name/'table.md').read_text() == (folder/'table.md').read_text() and not (tmp_path/'data').exists()


@pytest.mark.parametrize('args, sentence', [
    (['-p', 'sedes', '0'], "ValueError: unknown parameter of table3: 'sedes': choose one of profile, out, datasets"),
    (['-p', 'profile', 'lapotp'], "ValueError: unknown profile 'lapotp': choose one of smoke, laptop, paper"),
    (['-p', 'datasets', 'digit'], "ValueError: unknown dataset 'digit'"),
    (['-p', 'text_encoder', 'clip'], 'clip')])
def test_last_line_is_one_sentence(tmp_path, args, sentence):
    p = papermill('table3.ipynb', '-p', 'profile', 'smoke', *args, cwd=tmp_path, lico_root=tmp_path, output='x.ipynb')
    assert p.returncode != 0
    last = [o for o in p.stderr.splitlines() if o.strip()][-1]
    assert sentence in last and len(last) > 40, last


def test_parameters_tag_survives_cleaning(tmp_path):
    "Without `allowed_cell_metadata_keys`, nbdev-clean deletes the tag and papermill ignores every -p without a word."
    project = tmp_path/'project'
    (project/'nbs').mkdir(parents=True)
    (project/'lico').mkdir()
    for f in ('pyproject.toml', 'nbs/table3.ipynb', 'lico/__init__.py'): shutil.copy(TOP/f, project/f)
    def tags(): return [c.metadata.get('tags') for c in nbformat.read(project/'nbs'/'table3.ipynb', 4).cells if c.metadata.get('tags')]
    assert tags() == [['parameters']]
    clean = lambda: subprocess.run([BIN/'nbdev-clean'], cwd=project, check=True, capture_output=True)
    clean()
    assert tags() == [['parameters']]
    text = (project/'pyproject.toml').read_text()
    (project/'pyproject.toml').write_text('\n'.join(o for o in text.splitlines() if not o.startswith('allowed_cell_metadata_keys')))
    clean()
    assert tags() == [], 'the setting is what keeps it'


@pytest.mark.parametrize('path', sorted((TOP/'nbs').glob('*.ipynb')), ids=lambda p: p.name)
def test_notebook_is_fit_to_read(path):
    nb = nbformat.read(path, 4)
    assert path.stat().st_size < 200_000
    assert not any(o.output_type == 'error' for c in nb.cells if c.cell_type == 'code' for o in c.outputs)
    assert any(c.cell_type == 'markdown' and c.source.startswith('# ') for c in nb.cells)
    if path.stem.startswith(('table', 'figure')):
        lines = [line for c in nb.cells if c.cell_type == 'code' and 'parameters' not in c.metadata.get('tags', []) for line in c.source.splitlines() if line.strip()]
        assert len(lines) <= 40, 'what is not its own belongs into the library'


def test_wheel_carries_settings_and_numbers(tmp_path):
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', tmp_path, TOP], check=True, env={k: v for k, v in os.environ.items() if k != 'PIP_CONSTRAINT'})
    import zipfile
    names = zipfile.ZipFile(next(tmp_path.glob('*.whl'))).namelist()
    assert {'lico/settings.ini', 'lico/paper_results.csv', 'lico/model.py'} <= set(names) and not any('nbs' in n or 'tests' in n for n in names)
