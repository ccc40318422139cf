"""The site: built from what is stored without a warning, no link that leads nowhere, and pages that say what the code
says."""
import ast, csv, hashlib, importlib, importlib.util, inspect, io, json, re, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np, pytest, yaml
from browser import CHROMIUM, Browser

import lico
from lico.config import root

TOP = root()
GUIDE = TOP/'nbs'/'guide'
WAYS = {'works': ['paper'], 'understand': ['method/01_losses'], 'use': ['your_data', 'any_network']}


@pytest.fixture(scope='module')
def conf():
    spec = importlib.util.spec_from_file_location('conf', TOP/'nbs'/'conf.py')
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


# pages ----------------------------------------------------------------------------------------------------------------
def said():
    "What `lico` may stop with, warn of or print to standard error, with … for what differs."
    for path in (TOP/'lico').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.JoinedStr):
                yield ''.join(v.value if isinstance(v, ast.Constant) else '…' for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str): yield node.value


def quoted(): return re.findall(r'^### (`+)(.+)\1$', (GUIDE/'troubleshooting.md').read_text(encoding='utf-8'), re.M)


def test_troubleshooting_quotes_what_the_code_says():
    sentences = list(said())
    patterns = {message: re.compile('.*'.join(map(re.escape, message.split('…'))), re.S) for _, message in quoted()}
    gone = [message for message, pattern in patterns.items() if not any(map(pattern.search, sentences))]
    assert not gone, f'no sentence in lico/ reads: {gone}'
    assert len(quoted()) == len(re.findall('^### ', (GUIDE/'troubleshooting.md').read_text(encoding='utf-8'),
                                           re.M)) >= 30


def test_one_version():
    cff = yaml.safe_load((TOP/'CITATION.cff').read_text(encoding='utf-8'))
    newest = re.search(r'^## (\S+)', (TOP/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)[1]
    assert lico.__version__ == cff['version'] == newest


def test_changelog_names_the_protocols():
    from lico.experiments import MEASURING_PROTOCOL, TRAINING_PROTOCOL
    first = re.search(r'^## .*', (TOP/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)[0]
    assert f'(training {TRAINING_PROTOCOL}, measuring {MEASURING_PROTOCOL})' in first


def test_every_notebook_lies_on_a_way():
    "Two clicks from the start page: a way in, and a notebook that it lists."
    from fnmatch import fnmatch
    lists = '\n'.join((GUIDE/f'{way}.md').read_text(encoding='utf-8') for way in WAYS)
    entries = re.findall(r'^/(\S+)$', lists, re.M)
    for path in (TOP/'nbs').rglob('*.ipynb'):
        name = str(path.relative_to(TOP/'nbs').with_suffix(''))
        assert name == 'index' or any(fnmatch(name, e) for e in entries), f'{name} is listed in no page of nbs/guide'
    ways = (GUIDE/'_ways.md').read_text(encoding='utf-8')
    assert re.findall(r'/guide/(\w+)\.md', ways) == [*WAYS, 'look']


# what is shown of a notebook ------------------------------------------------------------------------------------------
def code(source, *outputs): return dict(cell_type='code', source=source, outputs=list(outputs), metadata={})


def test_prepared(conf):
    error = lambda text: dict(output_type='stream', name='stderr', text=text)
    shown = conf.prepared(dict(cells=[
        dict(cell_type='raw', source='---\nskip_exec: true\n---'), code('#| default_exp losses'),
        code(['#| hide\n', 'import nbdev']), code('#|hide\nx'), code('#| export\ndef f(): pass  # | not one'),
        dict(cell_type='markdown', source='see [here](x.ipynb#Two-Words), `36_stats` and `99_none`'),
        code('run()', error('\r0 of 2 runs to do: 0run [00:00, ?run/s]'),
             error('\r2 of 2:  50%|█████     | 1/2 [00:02<00:02,  2.95s/step]'), error('\n'), error('a warning\n'),
             dict(output_type='display_data', data={'text/markdown': ['1 ± 2']})),
        code('bars()', error('\rmaps: 100%|██████████| 2/2 [00:03<00:00,  1.61s/step]\n'))]))
    cells = shown['cells']
    assert [c['source'] for c in cells] == [
        'def f(): pass  # | not one',
        'see [here](x.ipynb#two-words), [`36_stats`](/evidence/36_stats.ipynb) and `99_none`',
        'run()', 'bars()']
    assert [o.get('text') or o['data']['text/markdown'] for o in cells[2]['outputs']] == ['a warning', '1\xa0±\xa02']
    assert cells[3]['outputs'] == []


def test_parameters_fold_away(conf):
    cells = [code('profile = ""') | dict(metadata=dict(tags=['parameters'])), code('import lico'), code('table()')]
    tags = [c['metadata'].get('tags') for c in conf.prepared(dict(cells=cells))['cells']]
    assert tags == [['hide-input'], ['hide-input'], None]
    assert not any(c['metadata'] for c in conf.prepared(dict(cells=[code('import lico')]))['cells'])


def test_start_page_is_the_readme(conf):
    "The site's numbers are the README's, and its links lead from `nbs/`."
    page, readme = conf.start_page(), (TOP/'README.md').read_text(encoding='utf-8')
    for number in re.findall(r'[+-]\d+\.\d+ ± \d+\.\d+', readme): assert number in page
    targets = re.findall(r'\]\((?!https?:|#|mailto:|/)([^)#\s]+)', page)
    assert len(targets) > 20 and all((TOP/'nbs'/t).exists() for t in targets)


# comments beside parameters -------------------------------------------------------------------------------------------
def example(
    a,  # [B, d]: one
    b=dict(  # not this
        c=1),  # two
    # of the last,
    # on two lines
    *, d='#', e=2,
    **options,  # the rest
) -> int:  # what comes back
    "Has comments."  # none of them


class Fields:
    "Has fields."
    a: int = 1  # one
    b: str = ''


class Init:
    def __init__(self, a, b,  # both
                 c): pass


def test_parameters(conf):
    assert conf.parameters(example) == {'a': '[B, d]: one', 'b': 'two', 'd, e': 'of the last, on two lines',
                                        'options': 'the rest', 'return': 'what comes back'}
    assert conf.parameters(Fields) == {'a': 'one'} and conf.parameters(Init) == {'a, b': 'both'}
    assert conf.parameters(len) == conf.parameters(int) == {}
    lines = []
    conf.docstring(None, 'function', '', example, None, lines)
    assert r'    * \ ``d, e``\  -- of the last, on two lines' in lines and ':Returns: what comes back' in lines


def test_mathml(conf):
    "What latex2mathml does not read as TeX does is put in its words first."
    for text in (r'\mathcal L_{CE}', r'\mathcal{L}_{CE}', r'\mathcal L_\text{CE}'):
        assert '<mi>&#x02112;</mi>' in conf.mathml(text), text  # a script L
    for text in (r'\Big\lVert x \Big\rVert_1', r'\|x\|', r'\tilde x', r'\frac1B'):
        assert '\\' not in conf.mathml(text), text


def test_docstring_is_no_markup(conf):
    lines = ['A `map`s of *all* x_ and |y|']
    conf.docstring(None, 'data', '', None, {}, lines)
    assert lines == [r'A \ ``map``\ s of \*all\* x\_ and \|y\|', '']
    lines = ['One line', 'and another.', '', 'Methods:', '  rise  `a`_ hides', '', 'net  a *network*']
    conf.docstring(None, 'data', '', None, {}, lines)
    assert lines == ['One line', 'and another.', '', '::', '', '    Methods:', '      rise  `a`_ hides', '',
                     '::', '', '    net  a *network*', '']


PUBLIC = {  # what people call, beside the classes whose fields they set
    'lico.config': 'preset options_from', 'lico.losses': 'LossOptions adjacency manifold_matching cost_matrix sinkhorn '
    'ot_alignment', 'lico.data': 'load', 'lico.batches': 'test_batches', 'lico.text': 'load_text_encoder CLIPText '
    'PromptLearner', 'lico.backbones': 'create_backbone features adapt', 'lico.model': 'CrossEntropy LICO save_network '
    'load_network', 'lico.schedule': 'TrainOptions', 'lico.training': 'fit', 'lico.saliency': 'explain overlay',
    'lico.metrics': 'insertion deletion pointing_game energy_pointing_game', 'lico.experiments': 'Run run sweep',
    'lico.paper': 'results compare coverage'}


@pytest.mark.parametrize('module, name', [(m, n) for m, names in PUBLIC.items() for n in names.split()])
def test_help_has_a_line_for_every_parameter(module, name):
    thing = getattr(importlib.import_module(module), name)
    text = inspect.getdoc(thing)
    lines = re.findall(r'^ *(\w+(?:, \w+)*)  +\S', text, re.M)
    told, methods = {n for line in lines for n in line.split(', ')}, {'rise', 'xrai', 'smoothgrad', 'random', 'edges'}
    assert told - (methods if name == 'explain' else set()) == set(inspect.signature(thing).parameters)


# the page to look at --------------------------------------------------------------------------------------------------
LOOKING = TOP/'figures'/'looking'
SCORES = 'probability', 'insertion', 'deletion'
TITLES = {'CE': 'CE', 'semantic': 'LICO', 'semantic-shuffled': 'LICO, shuffled names'}  # as the page has them


@pytest.fixture(scope='module')
def looks():
    "{(network, photograph, method): its row of results.csv}, read without the package."
    rows = list(csv.DictReader((LOOKING/'results.csv').open(encoding='utf-8', newline='')))
    return {(r['arm'], r['image'], r['saliency']): r for r in rows}


def test_what_the_page_reads_is_what_is_stored(looks):
    "Every number, curve and class of looking.json stands in results.csv, and each sheet is the one that it names."
    page = json.loads((LOOKING/'looking.json').read_text(encoding='utf-8'))
    assert {'/'.join(k) for k in looks} == set(page['looks']) and len(looks) == 3*5*6
    for key, r in looks.items():
        look = page['looks']['/'.join(key)]
        assert look['name'] == r['name'] and all(look[k] == float(r[k]) for k in SCORES), key
        for kind in ('insertion', 'deletion'):
            curve = look[f'{kind}_curve']
            assert curve == [float(o) for o in r[f'{kind}_curve'].split()] and len(curve) == len(page['fraction'])
            assert abs(np.trapezoid(curve, page['fraction'])/100 - look[kind]) < .01, key
        assert hashlib.sha256((LOOKING/r['sheet']).read_bytes()).hexdigest() == r['sheet_sha256']
    assert [n['name'] for n in page['networks']] == list(dict.fromkeys(k[0] for k in looks))
    assert {n['name']: n['accuracy'] for n in page['networks']} == {k[0]: float(r['accuracy_last'])
                                                                    for k, r in looks.items()}
    assert sum(p.stat().st_size for p in LOOKING.glob('maps-*')) < 5_000_000


def test_the_page_says_how_its_networks_fall_short(conf, looks):
    from lico.evidence.programme import BLOCKS
    page = conf.looking('{{ looked_at }}', (LOOKING/'looking.json').read_text(encoding='utf-8'))
    for r in looks.values():
        block, declared = BLOCKS[r['block']], BLOCKS[r['block']].how.get('epochs', 200)
        said = (f"{float(r['epochs']):.0f} of the declared {declared} epochs" if r['epochs']
                else f"{r['steps']} updates, not for the declared {declared} epochs")
        assert said in page or r['epochs'] and float(r['epochs']) == declared
        assert f"seed {r['seed']} alone of the declared {block.seeds}" in page
    assert '</script>' not in conf.looking('{{ looking }}', json.dumps(
        dict(networks=[], backbone='</script>', block='', dataset='', pixels=1, departures=[])))


@pytest.fixture(scope='module')
def look_page(tmp_path_factory):
    "That page as the site has it, built alone."
    out = tmp_path_factory.mktemp('site')
    alone = '**.ipynb,api/**,_*,guide/_*,guide/[!l]*'
    built = subprocess.run([Path(sys.executable).with_name('sphinx-build'), '-q', '-D', 'root_doc=guide/look', '-D',
                            f'exclude_patterns={alone}', TOP/'nbs', out], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return out/'guide'/'look.html'


@pytest.fixture(scope='module')
def browser():
    if not CHROMIUM: pytest.skip('no chromium here: apt-get install chromium')
    with Browser() as b: yield b


def expected(looks, photo, *sides):
    "The columns of the page's table for a pick, as texts."
    rows = []
    for side, (network, method) in zip(('left', 'right'), sides):
        r, noise = looks[network, photo, method], looks[network, photo, 'random']
        numbers = r['probability'], r['insertion'], noise['insertion'], r['deletion'], noise['deletion']
        rows.append([f'{side}: {TITLES[network]}, {method}', r['name'], *(f'{float(v):.1f}' for v in numbers)])
    return rows


table = "[1, 2].map(i => [...document.querySelectorAll('#look-table tr')].map(r => r.cells[i].textContent))"


def address(page, photo, *sides):
    return f"{page.as_uri()}#photo={photo}&{'&'.join(f'{k}={n}/{m}' for k, (n, m) in zip(('left', 'right'), sides))}"


def cell_shown(browser, element):
    "(network, photograph, method) whose cell in the sheets is most like what the element shows."
    from PIL import Image
    page = json.loads((LOOKING/'looking.json').read_text(encoding='utf-8'))
    image = Image.open(io.BytesIO(browser.shot(element))).convert('RGB')
    seen = np.asarray(image.crop((4, 4, image.width - 4, image.height - 4)).resize((56, 56)), float)
    found = {}
    for n in page['networks']:
        sheet = Image.open(LOOKING/n['sheet']).convert('RGB')
        for i, photo in enumerate(page['photographs']):
            for j, method in enumerate(['photograph', *n['methods']]):
                own = sheet.crop((j*224 + 2, i*224 + 2, (j + 1)*224 - 2, (i + 1)*224 - 2)).resize((56, 56))
                found[n['name'], photo, method] = np.abs(np.asarray(own, float) - seen).mean()
    return min(found, key=found.get)


PICKS = [('chelsea', ('CE', 'grad-cam'), ('semantic', 'rise')),
         ('camera', ('semantic-shuffled', 'edges'), ('CE', 'group-cam')),
         ('rocket', ('semantic', 'random'), ('semantic', 'grad-cam++'))]


@pytest.mark.slow
@pytest.mark.parametrize('pick', PICKS, ids=lambda p: p[0])
def test_the_page_shows_what_is_picked(browser, look_page, looks, pick):
    "Numbers, pictures, curves and the texts for who cannot see them; no word of complaint in the console."
    photo, *sides = pick
    browser.size(1280)
    browser.open(address(look_page, *pick))
    assert not browser.errors and browser.run(table) == expected(looks, *pick)
    assert cell_shown(browser, '#look-photo')[1:] == (photo, 'photograph')
    for side, (network, method) in zip(('left', 'right'), sides):
        r = looks[network, photo, method]
        if method not in ('edges', 'random'): assert cell_shown(browser, f'#look-{side}') == (network, photo, method)
        else: assert cell_shown(browser, f'#look-{side}')[1:] == (photo, method)  # the same for all networks
        label = browser.run(f"document.getElementById('look-{side}').getAttribute('aria-label')")
        assert method in label and TITLES[network] in label and r['name'] in label
        said = browser.run("document.getElementById('look-summary').textContent")
        assert f"{TITLES[network]} names it “{r['name']}” with {float(r['probability']):.1f} %" in said
    drawn = browser.run("document.querySelector('#look-deletion path.left:not(.random)').getAttribute('d')")
    heights = [float(o) for o in re.findall(r' ([\d.]+)', drawn)]
    curve = [float(o) for o in looks[sides[0][0], photo, sides[0][1]]['deletion_curve'].split()]
    assert len(heights) == len(curve)
    assert np.ptp(curve) < .5 or np.corrcoef(heights, curve)[0, 1] < -.999  # y points down


@pytest.mark.slow
def test_an_altered_number_is_seen(browser, look_page, looks, tmp_path):
    "What the test above relies on: the page shows what it was given, not what it ought to have been."
    text, pick = look_page.read_text(encoding='utf-8'), PICKS[0]
    stored = json.dumps(float(looks['CE', 'chelsea', 'grad-cam']['insertion']))
    other = look_page.with_name('altered.html')
    other.write_text(re.sub(rf'("CE/chelsea/grad-cam".*?"insertion": ){re.escape(stored)}', r'\g<1>99.9', text, count=1,
                            flags=re.S), encoding='utf-8')
    browser.open(address(other, *pick))
    assert browser.run(table)[0][3] == '99.9' != expected(looks, *pick)[0][3]


@pytest.mark.slow
def test_the_page_by_keyboard_on_a_phone_in_the_dark(browser, look_page, looks):
    browser.size(390, 844, dark=True)
    browser.open(look_page.as_uri())
    first = browser.run(table)
    assert browser.run('document.documentElement.scrollWidth') <= 390
    assert browser.run("matchMedia('(prefers-color-scheme: dark)').matches")
    names = []
    browser.run("document.querySelector('[name=photo]').focus()")
    for _ in range(5):
        names.append(browser.run("document.activeElement.name"))
        assert browser.run("document.activeElement.labels[0].textContent.length > 0")
        assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == 'solid'
        browser.press('Tab', 9)
    assert names == ['photo', 'left-network', 'left-method', 'right-network', 'right-method']
    browser.run("document.querySelector('[name=left-method]').focus()")
    browser.press('ArrowDown', 40)
    second = browser.run(table)
    assert second != first and second[1] == first[1] and not browser.errors
    photo, network, method = browser.run(
        "['photo', 'left-network', 'left-method'].map(k => document.forms.look[k].value)")
    assert second[0] == expected(looks, photo, (network, method))[0]
    assert f'left={network}/{method}' in browser.run('location.hash')


# the build ------------------------------------------------------------------------------------------------------------
class Page(HTMLParser):
    "Links and anchors of a page, and what it loads."
    def __init__(self, path):
        super().__init__()
        self.links, self.anchors, self.loads = [], set(), []
        self.feed(text := path.read_text(encoding='utf-8'))
        self.unread = [m for m in re.findall('<math.*?</math>', text, re.S) if '\\' in m]

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        if tag == 'a' and 'href' in attrs: self.links.append(attrs['href'])
        elif target := attrs.get('src') or attrs.get('href'): self.loads.append(target)


@pytest.mark.slow
def test_site():
    "As the README's command builds it, anew: no warning, no dead link, nothing from another host, every public name."
    command = re.search(r'\.venv/bin/(sphinx-build .*)$', (TOP/'README.md').read_text(encoding='utf-8'), re.M)
    command = command[1] if command else 'sphinx-build -qW nbs _docs/html'
    built = subprocess.run([Path(sys.executable).with_name('sphinx-build'), '-E', *command.split()[1:]], cwd=TOP,
                           capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    site = TOP/command.split()[-1]
    pages = {p: Page(p) for p in site.rglob('*.html')}
    assert len(pages) > 90
    for path, page in pages.items():
        assert not [o for o in page.loads if re.match(r'(https?:)?//', o)], f'{path} loads from another host'
        assert not page.unread, f'{path}: {page.unread}'
        for link in {*page.links, *page.loads}:
            if re.match(r'[a-z]+:', link): continue
            target, _, anchor = unquote(link.split('?')[0]).partition('#')
            to = (path.parent/target).resolve() if target else path
            assert to.exists(), f'{path}: {link}'
            assert not anchor or to not in pages or anchor in pages[to].anchors, f'{path}: {link}'
    for way, ends in WAYS.items():
        assert f'guide/{way}.html' in pages[site/'index.html'].links
        for end in ends:
            if (TOP/'nbs'/f'{end}.ipynb').exists():
                assert f'../{end}.html' in pages[site/'guide'/f'{way}.html'].links
    public_names(site)


def public_names(site):
    "Each function and class in `__all__` has a place in the reference, with the comments beside its parameters."
    import importlib
    from sphinx.util.inventory import InventoryFile
    with open(site/'objects.inv', 'rb') as f: known = InventoryFile.loads(f.read(), uri='').data
    known = {name for kind in known.values() for name in kind}
    for page in (site/'api').glob('lico.*.html'):
        module = importlib.import_module(page.stem)
        wanted = {f'{page.stem}.{n}' for n in module.__all__
                  if inspect.isroutine(o := getattr(module, n)) or inspect.isclass(o)}
        assert not wanted - known, f'without a docstring: {wanted - known}'
    text = (site/'api'/'lico.losses.html').read_text(encoding='utf-8')
    assert '[B, N, M], cost of moving row n to row m' in text and 'weights of L_MM and of L_OT in Eq. 8' in text
