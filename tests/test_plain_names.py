"""What somebody calls a folder or a class comes out as it was written: in Markdown, in pictures, in files; and every
text file is UTF-8."""
import ast, re
import nbformat, numpy as np, pandas as pd, pytest
import matplotlib.pyplot as plt
from lico.config import root
from lico.evidence.arms import compare
from lico.evidence.report import comparison_table, dataset_title, forest, in_markdown, in_picture, sentences
from lico.evidence.store import read_points, read_results, short_names, write_results

TOP = root()
NAMES = ['$', '|', 'None', 'NA', 'nan', '_', '*', '<b>', 'a$b$c', r'$\alpha$', 'a|b', '*x*', '_x_', '`x`', 'null',
         'N/A', '~~x~~', '&lt;']

def shown_as(markdown):
    "The text that a reader of rendered Markdown sees."
    from html import unescape
    import mistune
    return unescape(re.sub('<[^>]+>', '', mistune.html(markdown))).strip()

@pytest.mark.parametrize('name', NAMES)
def test_markdown_shows_a_name_as_it_is(name):
    pytest.importorskip('mistune')
    assert shown_as(f'x {in_markdown(name)} y') == f'x {name} y'
    assert '$' not in in_markdown(name).replace(r'\$', '') and '|' not in in_markdown(name).replace(r'\|', '')

@pytest.mark.parametrize('name', NAMES)
def test_a_picture_shows_a_name_as_it_is(name):
    fig, ax = plt.subplots()
    text = ax.set_title(in_picture(name))
    drawn, parse = [], text._preprocess_math
    text._preprocess_math = lambda s: (drawn.append(parse(s)), parse(s))[1]
    fig.canvas.draw(); plt.close(fig)
    assert drawn and drawn[0] == (name, False)

def rows(dataset):
    return [dict(id=f'{arm}{s}', arm=arm, method=arm, seed=s, split=s, dataset=dataset, paper_dataset=None,
                 is_stand_in=True,
                 labels='40', backbone='wrn_16_1', steps=1, preset='paper', classes=10, accuracy_last=50. + s, data='x',
                 text_encoder=None if arm == 'CE' else 'minilm', cosine=.5, entropy_image=.5, entropy_text=.5)
            for arm in ('CE', 'LICO') for s in range(3)]

@pytest.mark.parametrize('name', ['a|b', 'a$b$c', '<b>', '*x*'])
def test_tables_sentences_and_plots_of_a_folder_so_called(tmp_path, name):
    c = compare(pd.DataFrame(rows(f'folder:{name}') + [r | dict(id=r['id'] + 'd') for r in rows('digits')]), 3)
    table = comparison_table(c)
    assert in_markdown(name) in table and len({len(re.findall(r'(?<!\\)\|', line)) for line in table.splitlines()}) == 1
    assert f'**{in_markdown(name)}, ' in sentences(c) and 'wrn_16_1' in table
    fig = forest(c)
    fig.canvas.draw()
    labels = [t.get_text() for ax in fig.axes for t in ax.get_yticklabels()]
    assert any(in_picture(name) in o for o in labels)
    plt.close(fig)

def test_files_keep_names_that_look_like_nothing(tmp_path):
    points = pd.DataFrame(dict(id='a', x=1., y=2., name=NAMES))
    write_results(tmp_path, points[['id']].drop_duplicates(), points=points)
    assert read_points(tmp_path).name.tolist() == NAMES
    df = pd.DataFrame([r | dict(dataset=name) for name in ('NA', 'None', 'null') for r in rows('x')[:1]])
    df['id'] = range(3); df['empty'] = [np.nan, 1., np.nan]
    back = write_results(tmp_path, df)
    assert back.dataset.tolist() == read_results(tmp_path).dataset.tolist() == ['NA', 'None', 'null']
    assert back['empty'].isna().tolist() == [True, False, True] and back.text_encoder.isna().all()

def test_two_folders_of_one_last_name_are_two_datasets():
    names = ['folder:/a/birds', 'folder:/b/birds', 'folder:/b/cats', 'digits', 'folder:/a/birds']
    short = short_names(names)
    assert short == {'folder:/a/birds': 'folder:a/birds', 'folder:/b/birds': 'folder:b/birds',
                     'folder:/b/cats': 'folder:cats',
                     'digits': 'digits'}
    assert [dataset_title(o) for o in short.values()] == ['a/birds', 'b/birds', 'cats', 'digits']
    assert short_names(['folder:/x/digits', 'digits']) == {'folder:/x/digits': 'folder:digits', 'digits': 'digits'}
    assert short_names(['folder:/']) == {'folder:/': 'folder:/'} and dataset_title('folder:/x/y') == 'y'

def unsaid(source):
    "Lines of reads and writes of text that leave the encoding to the locale."
    for c in ast.walk(ast.parse(source)):
        if not isinstance(c, ast.Call) or any(k.arg in ('encoding', None) for k in c.keywords): continue
        name = c.func.attr if isinstance(c.func, ast.Attribute) else getattr(c.func, 'id', '')
        if name == 'read_text' and not c.args or name == 'write_text' and len(c.args) == 1: yield c.lineno
        if name == 'open' and isinstance(c.func, ast.Name):
            mode = c.args[1].value if len(c.args) > 1 and isinstance(c.args[1], ast.Constant) else 'r'
            if 'b' not in mode: yield c.lineno

def test_every_text_is_read_and_written_as_utf_8():
    found = []
    for path in [*TOP.glob('lico/**/*.py'), *TOP.glob('tests/*.py')]:
        found += [f'{path.name}:{n}' for n in unsaid(path.read_text(encoding='utf-8'))]
    for path in TOP.glob('nbs/**/*.ipynb'):
        for c in nbformat.read(path, 4).cells:
            code = '\n'.join(o for o in c.source.splitlines() if not o.lstrip().startswith(('%', '!')))
            if c.cell_type == 'code': found += [f'{path.name}: {code.splitlines()[n - 1]}' for n in unsaid(code)]
    assert not found, f'say encoding="utf-8" there: {found}'
