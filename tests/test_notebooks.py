"""Notebooks as a user runs them: parameters refused or obeyed, smokes of all, committed tables drawn again from
their files, tags and links that hold."""
import os, re, shutil, subprocess, sys, warnings
from pathlib import Path

import nbformat, pandas as pd, pytest

import lico
from lico.config import root
from lico.evidence.ambiguities import changes
from lico.evidence.arms import TABLES

TOP = root()
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted((TOP/'nbs').rglob('*.ipynb'))


def papermill(notebook, *args, cwd, lico_root, output=None):
    "A notebook in a kernel of its own, from the command line."
    env = {**os.environ, 'LICO_ROOT': str(lico_root), 'PATH': f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run([BIN/'papermill', TOP/'nbs'/notebook, *([output] if output else []), *args], cwd=cwd, env=env,
                          capture_output=True, text=True)


def run(notebook, **parameters):
    """A notebook in this process, which has imported what it needs: what papermill would put behind its first cell,
    then its cells, one after the other."""
    from IPython.core.interactiveshell import InteractiveShell
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook
    import matplotlib.pyplot as plt
    nb, shell = (parameterize_notebook(load_notebook_node(str(TOP/'nbs'/f'{notebook}.ipynb')), parameters),
                 InteractiveShell())
    try:
        with warnings.catch_warnings():  # two steps into the paper's reading, matching is already empty
            warnings.simplefilter('ignore')
            for cell in (c for c in nb.cells if c.cell_type == 'code'):
                source = '\n'.join(line for line in cell.source.splitlines() if not line.startswith('%config'))
                shell.run_cell(source, store_history=True, silent=False).raise_error()
    finally: plt.close('all')
    return shell.user_ns


def smoke(notebook, lico_root, **parameters):
    "The folder that a smoke has written to."
    run(notebook, profile='smoke', **parameters)
    return lico_root/'data'/'smoke'/notebook


@pytest.mark.slow
def test_table3_from_any_folder(tmp_path):
    p = papermill('table3.ipynb', '-p', 'profile', 'smoke', cwd=tmp_path, lico_root=tmp_path)
    assert p.returncode == 0, p.stderr[-3000:]
    assert nbformat.reads(p.stdout, 4).cells, 'with no output path papermill writes the notebook to standard output'
    assert 'Unable to parse line' not in p.stderr and 'profile smoke' in p.stdout and 'minilm' in p.stdout
    out = tmp_path/'data'/'smoke'/'table3'
    assert ({f.name for f in out.iterdir()} - {'.lock'} == {'figure.png', 'results.csv', 'table.md', 'SHA256SUMS'}
            and not (tmp_path/'figures').exists())
    df = pd.read_csv(out/'results.csv')
    assert (df.method.tolist() == ['CE', 'LICO'] and (df.profile == 'smoke').all()
            and 'digits (for CIFAR-10)' in (out/'table.md').read_text(encoding='utf-8'))


@pytest.mark.slow
def test_table3_on_a_folder(tmp_path, lico_root):
    """datasets (with a comma in its path), labels, seeds, backbones and out do what they say, and what was run
    before is not run again."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    images, target = load_digits(return_X_y=True)
    for i in range(300):
        path = tmp_path/'my, images'/('train' if i < 200 else 'test')/f'digit {target[i]}'/f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((images[i].reshape(8, 8)*15.9).astype(np.uint8)).resize((16, 16)).save(path)
    given = dict(profile='smoke', labels='20', seeds='0,1', backbones='wrn_10_1', steps='1', out=f'{tmp_path}/out')
    p = papermill('table3.ipynb', '-y', f'datasets: ["folder:{tmp_path}/my, images"]', *(
        o for name, value in given.items() for o in ('-p', name, value)), cwd=tmp_path, lico_root=lico_root,
        output='x.ipynb')
    assert p.returncode == 0, p.stderr[-3000:]
    df = pd.read_csv(tmp_path/'out'/'results.csv')
    assert sorted(df.seed) == [0, 0, 1, 1] and (df.labels == 20).all() and df.paper_dataset.isna().all()
    before = {f: f.stat().st_mtime for f in lico_root.glob('data/runs/*/record.json')}
    run('table3', datasets=[f'folder:{tmp_path}/my, images'], **given)
    assert before == {f: f.stat().st_mtime for f in lico_root.glob('data/runs/*/record.json')} and len(before) == 4


slow = lambda names, quick: [n if n == quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize('n', slow(sorted(set(TABLES) - {3}), 2))
def test_tables_smoke(lico_root, n):
    out = smoke(f'table{n}', lico_root)
    assert {'figure.png', 'results.csv', 'table.md'} <= {f.name for f in out.iterdir()} <= {
        'figure.png', 'results.csv', 'table.md', 'scores.csv', '.lock', 'SHA256SUMS'}
    df = pd.read_csv(out/'results.csv')
    assert (TABLES[n].reference in set(df.arm) and df.arm.nunique() > 1 and (df.profile == 'smoke').all()
            and f'Table {n}' in (out/'table.md').read_text(encoding='utf-8'))
    if (out/'scores.csv').exists(): assert len(pd.read_csv(out/'scores.csv')) == df.images.sum()


@pytest.mark.parametrize('n', slow(range(3, 11), 10))
def test_figures_smoke(lico_root, n):
    out, own = smoke(f'figure{n}', lico_root), {9: {'classes', 'ordinal'}, 10: {'kl'}}
    files = {'figure.png', 'results.csv', 'table.md', 'SHA256SUMS'} | ({'points.csv'} if n == 9 else set())
    there = {f.name for f in out.iterdir() if not f.name.startswith('.')}
    assert files == there if n in own else files <= there
    columns = {'seed', 'hardware', 'torch', 'commit', 'profile', 'arm'} | own.get(n, set())
    assert columns <= set(pd.read_csv(out/'results.csv'))


@pytest.mark.slow
def test_fidelity_smoke(lico_root):
    out = smoke('fidelity', lico_root)
    df = pd.read_csv(out/'results.csv')
    assert {'CE', 'LICO'} == set(df.method) and (df.method == 'LICO').sum() > len(changes('repaired'))/2
    assert all(choice in (out/'table.md').read_text(encoding='utf-8') for choice, _ in changes('repaired'))


@pytest.mark.slow
def test_study_smoke(lico_root):
    df = pd.read_csv(smoke('study', lico_root)/'results.csv')
    assert ((df.validation == 100).all() and (df.seed >= 100).all()
            and set(df.arm.str.split(':').str[0]) == {'repaired', 'supcon', 'semantic'})


@pytest.mark.slow
def test_language_smoke(lico_root):
    out = smoke('language', lico_root, block='A', datasets='digits', seeds='0')
    assert (pd.read_csv(out/'results.csv').arm.nunique() == 10
            and 'right names beat shuffled names' in (out/'table.md').read_text(encoding='utf-8'))


@pytest.mark.slow
def test_looking_smoke(lico_root):
    out = smoke('looking', lico_root)
    df = pd.read_csv(out/'results.csv')
    assert list(df.arm.unique()) == ['CE', 'semantic', 'semantic-shuffled'] and len(df) == 3*5*3
    assert ({f.name for f in out.iterdir()} - {'.lock'} == {'results.csv', 'SHA256SUMS', 'looking.json', 'table.md',
            'figure.png', *(f'maps-{arm}.webp' for arm in df.arm.unique())})
    assert ('trained for 2 updates, not for the declared 200 epochs; trained on digits, not on the declared cifar10'
            in (out/'table.md').read_text(encoding='utf-8'))


@pytest.mark.slow
def test_language_smoke_with_maps(lico_root, tmp_path):
    "Block E on a folder with boxes: maps of every arm, its own metrics of Grad-CAM, all beside random maps."
    from lico.evidence.programme import BLOCKS
    import numpy as np
    from PIL import Image
    rng, boxes = np.random.default_rng(0), ['file,x0,y0,x1,y1']
    for i in range(12):
        path = f"{'train' if i < 8 else 'test'}/{'ab'[i % 2]}/{i}.png"
        (tmp_path/path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path/path)
        boxes.append(f'{path},0,0,40,40')
    (tmp_path/'boxes.csv').write_text('\n'.join(boxes), encoding='utf-8')
    out = smoke('language', lico_root, block='E', datasets=f'folder:{tmp_path}', seeds='0', steps=1, test_images=1,
                saliency='grad-cam,random')
    df = pd.read_csv(out/'results.csv')
    arms = len(BLOCKS['E'].arms)
    assert df.arm.nunique() == arms and len(df) == 2*arms
    assert df.deletion_noise.notna().all() and df.energy.notna().all()
    assert "own random map" in (out/'table.md').read_text(encoding='utf-8')


def test_protocol_is_what_the_code_says(lico_root):
    "The declaration that was committed is the one that the code would write."
    shutil.copytree(TOP/'figures'/'protocol', lico_root/'figures'/'protocol')  # changes.md, written by hand
    run('protocol', out=str(lico_root/'out'))
    assert (lico_root/'out'/'table.md').read_bytes() == (TOP/'figures'/'protocol'/'table.md').read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize('folder', sorted(p.parent for p in (TOP/'figures').glob('*/results.csv')),
                         ids=lambda p: p.name)
def test_committed_results_are_drawn_from_the_file_alone(lico_root, folder):
    "In a root without data and without records, `-p stored only` gives the committed table, letter for letter."
    out = shutil.copytree(folder, lico_root/'figures'/folder.name)
    (out/'table.md').unlink()
    name, _, block = folder.name.partition('-')
    run(name, stored='only', out=str(out), **(dict(block=block) if name == 'language' else {}))
    assert (out/'table.md').read_bytes() == (folder/'table.md').read_bytes()
    assert not (lico_root/'data').exists()


@pytest.mark.parametrize(
    'given, sentence', [(dict(sedes='0'), "unknown parameter of table3: 'sedes': choose one of profile, out, datasets"),
                        (dict(profile='lapotp'), "unknown profile 'lapotp': choose one of smoke, laptop, paper"),
                        (dict(datasets='digit'), "unknown dataset 'digit'"), (dict(text_encoder='clip'), 'clip')])
def test_what_is_refused_is_said_in_one_sentence(lico_root, given, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence)) as e:
        run('table3', **dict(profile='smoke') | given)
    assert '\n' not in str(e.value) and len(str(e.value)) > 40


@pytest.mark.slow
def test_the_last_line_of_papermill_is_that_sentence(tmp_path):
    p = papermill('table3.ipynb', '-p', 'profile', 'smoke', '-p', 'sedes', '0', cwd=tmp_path, lico_root=tmp_path,
                  output='x.ipynb')
    assert (
        p.returncode != 0
        and "ValueError: unknown parameter of table3: 'sedes'" in [o for o in p.stderr.splitlines() if o.strip()][-1])


def test_parameters_tag_survives_cleaning(tmp_path):
    "Without `allowed_cell_metadata_keys`, nbdev-clean deletes the tag and papermill ignores every -p without a word."
    project = tmp_path/'project'
    (project/'nbs').mkdir(parents=True)
    (project/'lico').mkdir()
    for f in ('pyproject.toml', 'nbs/table3.ipynb', 'lico/__init__.py'): shutil.copy(TOP/f, project/f)
    def tags():
        return [c.metadata.get('tags')
                for c in nbformat.read(project/'nbs'/'table3.ipynb', 4).cells if c.metadata.get('tags')]
    def clean(): subprocess.run([BIN/'nbdev-clean'], cwd=project, check=True, capture_output=True)
    clean()
    assert tags() == [['parameters']]
    text = (project/'pyproject.toml').read_text(encoding='utf-8')
    (project/'pyproject.toml').write_text('\n'.join(o for o in text.splitlines()
                                                    if not o.startswith('allowed_cell_metadata_keys')),
                                                    encoding='utf-8')
    clean()
    assert tags() == [], 'the setting is what keeps it'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_fit_to_read(path):
    nb = nbformat.read(path, 4)
    code = [c for c in nb.cells if c.cell_type == 'code']
    assert (path.stat().st_size < 200_000
            and any(c.cell_type == 'markdown' and c.source.startswith('# ') for c in nb.cells))
    assert not any(o.output_type == 'error' for c in code for o in c.outputs)
    if path.parent == TOP/'nbs' and path.stem != 'index':
        assert (code[0].metadata.get('tags') == ['parameters']
                and "'" not in code[0].source), 'papermill cannot parse a line with an apostrophe'
        lines = [line for c in code[1:] for line in c.source.splitlines()
                 if line.strip() and not line.startswith(('import ', 'from '))]
        most = dict(any_network=60, your_data=200).get(path.stem, 40)
        assert len(lines) <= most, 'what is not its own belongs into the library'


def test_notebooks_stand_in_the_order_of_imports():
    "Numbers (06, 06b, 07) are unique, and every import is of a module with a lower one."
    number, exports = {}, {}
    for path in NOTEBOOKS:
        source = '\n'.join(c.source for c in nbformat.read(path, 4).cells
                           if c.cell_type == 'code' and '#| export' in c.source or 'default_exp' in c.source)
        if m := re.search(r'default_exp (\S+)', source):
            number[m[1]], exports[m[1]] = path.stem.partition('_')[0], source
    assert len(set(number.values())) == len(number) == len(exports)
    for module, source in exports.items():
        for other in re.findall(r'^(?:from|import) lico\.([\w.]+)', source, re.M):
            assert number[other] < number[module], f'{module} imports {other}'
    assert not [m for m, s in exports.items() if not m.startswith('evidence') and m != 'paper'
                and 'lico.evidence' in s], 'nothing in the method imports from the wing'


def test_a_public_name_stands_for_one_thing():
    "Of everything that modules define; what a module only hands on is the same thing."
    where = {}
    for path in NOTEBOOKS:
        source = '\n'.join(c.source for c in nbformat.read(path, 4).cells
                           if c.cell_type == 'code' and '#| export' in c.source)
        for name in re.findall(r'^(?:def |class |(?=[A-Za-z]\w* = ))([A-Za-z]\w*)', source, re.M):
            where.setdefault(name, set()).add(path.stem)
    assert len(where) > 300 and not {name: of for name, of in where.items() if len(of) > 1}


def test_links_lead_somewhere():
    for path in NOTEBOOKS + [TOP/'README.md']:
        text = (path.read_text(encoding='utf-8') if path.suffix == '.md'
                else '\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown'))
        for target in re.findall(r'\]\((?!https?:|#|mailto:)([^)#\s]+)', text):
            assert (path.parent/target).exists(), f'{path.name}: {target}'
        for name in re.findall(r'`(\d\d[a-z]?_[a-z_]+)`', text):
            assert list((TOP/'nbs').rglob(f'{name}.ipynb')), f'{path.name}: {name}'


def test_what_a_page_shows_is_what_is_stored():
    "Tables of `table.md` that a notebook's stored outputs show, and the sentences of its lists, row by row."
    shown = 0
    for path in (TOP/'nbs').glob('*.ipynb'):
        if not (stored := TOP/'figures'/path.stem/'table.md').exists(): continue
        outputs = [o for c in nbformat.read(path, 4).cells for o in c.get('outputs', ())]
        text = '\n'.join(o.get('data', {}).get('text/markdown', '') for o in outputs).splitlines()
        for header, *rows in (b.splitlines() for b in stored.read_text(encoding='utf-8').split('\n\n')):
            if header[:1] not in '|*' or header not in text and header[0] == '|': continue
            assert not (stale := [r for r in (header, *rows) if r not in text]), f'{path.name}: {stale[0]}'
            shown += 1
    assert shown > 50


def test_no_bars_are_stored():
    "What a bar drew while a notebook ran is no output."
    for path in NOTEBOOKS:
        outputs = [o for c in nbformat.read(path, 4).cells if c.cell_type == 'code' for o in c.outputs]
        assert not any('%|' in o.get('text', '') or '\r' in o.get('text', '') for o in outputs), path.name


def test_stored_sentences_are_those_of_the_stored_results():
    "What a page says with a number stands in the table.md beside its results: neither was drawn anew alone."
    kept = {line for path in (TOP/'figures').glob('*/table.md')
            for line in path.read_text(encoding='utf-8').splitlines()}
    said = [line for path in NOTEBOOKS if path.parent.name == 'nbs' for cell in nbformat.read(path, 4).cells
            for out in cell.get('outputs', []) for line in out.get('data', {}).get('text/markdown', '').splitlines()
            if line.startswith('* **') and '±' in line]
    assert len(said) > 50 and not set(said) - kept


def test_lines_of_code_are_short():
    "In tests and cells; a module's first line is its notebook's prose, and its `__all__` is written by nbdev."
    sources = {p.name: p.read_text(encoding='utf-8') for p in (TOP/'tests').glob('*.py')}
    for path in NOTEBOOKS:
        sources[path.name] = '\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'code')
    long = [f'{name}: {line}' for name, source in sources.items() for line in source.splitlines() if len(line) > 120]
    assert not long, f'{len(long)} lines over 120 characters: {long[:5]}'


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(tmp_path):
    "It carries settings and numbers, and needs no root for the paper's numbers and for maps."
    env = {k: v for k, v in os.environ.items() if k not in ('PIP_CONSTRAINT', 'LICO_ROOT')}
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', tmp_path, TOP], check=True, env=env)
    import zipfile
    (wheel,) = tmp_path.glob('*.whl')
    names = zipfile.ZipFile(wheel).namelist()
    assert ({'lico/settings.ini', 'lico/paper_results.csv', 'lico/model.py', 'lico/evidence/stats.py'} <= set(names)
            and not any('nbs' in n or 'tests' in n for n in names))
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', tmp_path/'site', wheel],
                   check=True, env=env)
    code = """if True:
        import torch, lico
        from lico.backbones import create_backbone
        from lico.paper import results
        from lico.saliency import explain
        net = create_backbone('wrn_10_1', num_classes=3, image_size=16).eval()
        maps = explain(net, torch.randn(2, 3, 16, 16), method='grad-cam')
        print(lico.__file__, lico.__version__, len(results()), tuple(maps.shape))"""
    said = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
                          env=env | dict(PYTHONPATH=str(tmp_path/'site')))
    expected = f"{tmp_path/'site'/'lico'/'__init__.py'} {lico.__version__} 271 (2, 16, 16)\n"
    assert said.stdout == expected, said.stdout + said.stderr
