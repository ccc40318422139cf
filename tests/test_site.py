"""The site: built from what is stored without a warning, no link that leads nowhere, and pages that say what the code
says."""
import ast, importlib.util, inspect, re, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest, yaml

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
    assert re.findall(r'/guide/(\w+)\.md', ways) == list(WAYS)


# what is shown of a notebook ------------------------------------------------------------------------------------------
def code(source, *outputs): return dict(cell_type='code', source=source, outputs=list(outputs), metadata={})


def test_prepared(conf):
    error = lambda text: dict(output_type='stream', name='stderr', text=text)
    shown = conf.prepared(dict(cells=[
        dict(cell_type='raw', source='---\nskip_exec: true\n---'), code('#| default_exp losses'),
        code(['#| hide\n', 'import nbdev']), code('#|hide\nx'), code('#| export\ndef f(): pass  # | not one'),
        dict(cell_type='markdown', source='see [here](x.ipynb#Two-Words), `24_stats` and `99_none`'),
        code('run()', error('\r0 of 2 runs to do: 0run [00:00, ?run/s]'),
             error('\r2 of 2:  50%|█████     | 1/2 [00:02<00:02,  2.95s/step]'), error('\n'), error('a warning\n'),
             dict(output_type='display_data', data={'text/markdown': ['1 ± 2']})),
        code('bars()', error('\rmaps: 100%|██████████| 2/2 [00:03<00:00,  1.61s/step]\n'))]))
    cells = shown['cells']
    assert [c['source'] for c in cells] == [
        'def f(): pass  # | not one',
        'see [here](x.ipynb#two-words), [`24_stats`](/evidence/24_stats.ipynb) and `99_none`',
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
    assert '[B, N, M]: cost of moving row n to row m' in text and 'weight of L_MM in Eq. 8' in text
