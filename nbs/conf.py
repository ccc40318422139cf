"""The site: these notebooks as they are stored, nothing is run, and the package's docstrings with the comments beside
their parameters. `sphinx-build -W nbs _docs` (Quarto, nbdev's own way, cannot be installed everywhere)."""
import ast, inspect, json, re, textwrap, tokenize
from io import StringIO
from pathlib import Path

import yaml
from docutils import nodes
from latex2mathml.converter import convert

import lico

NBS = Path(__file__).resolve().parent
TOP = NBS.parent

project, author, release = 'lico', 'The lico developers', lico.__version__
version, copyright = release, f'{author}, Apache-2.0'
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.githubpages']
exclude_patterns = ['**/.ipynb_checkpoints', '_*']
root_doc = 'index'

nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'myst'
nb_ipywidgets_js = {}  # no widget, no script from another host
myst_enable_extensions = ['dollarmath', 'substitution']
myst_heading_anchors = 3
myst_update_mathjax = False

autodoc_default_options = dict(members=True) | {'member-order': 'bysource'}
autodoc_preserve_defaults = True
autodoc_typehints = 'none'
add_module_names = False

html_theme, html_title = 'furo', f'lico {release}'
html_math_renderer = 'mathml'
html_static_path, html_css_files = ['_static'], ['site.css']
html_copy_source, html_show_sourcelink = False, False
html_theme_options = dict(top_of_page_buttons=[])


# notebooks ------------------------------------------------------------------------------------------------------------
_bar = re.compile(r'\[(?:\d\d:\d\d(?:<.*)?|[^\]]*\?\w+/s)[^\]]*\]$')  # how a line of tqdm ends


def _plain(text):
    "Standard error as a terminal ends up showing it, without progress bars."
    lines = (line.rsplit('\r', 1)[-1] for line in text.replace('\r\n', '\n').split('\n'))
    return '\n'.join(line for line in lines if line.strip() and not _bar.search(line.strip()))


def _streams(outputs):
    "Outputs in which neighbouring standard errors are one, and gone if they were progress bars alone."
    kept = []
    for o in outputs:
        if o.get('name') == 'stderr' and kept and kept[-1].get('name') == 'stderr':
            kept[-1] = o | dict(text=''.join([*kept[-1]['text'], *o['text']]))
        else: kept.append(o)
    kept = [o | dict(text=_plain(''.join(o['text']))) if o.get('name') == 'stderr' else o for o in kept]
    for o in kept:  # a mean stays on one line with its spread
        if md := o.get('data', {}).get('text/markdown'): o['data']['text/markdown'] = ''.join(md).replace(' ± ', '\xa0±\xa0')
    return [o for o in kept if o.get('name') != 'stderr' or o['text']]


def _linked(text):
    "Prose whose links work here: headings in small letters, and notebooks that are named by their number."
    text = re.sub(r'(?<=\]\()([^)\s#]*#)([^)\s]+)', lambda m: m[1] + m[2].lower(), text)
    homes = {p.stem: p.relative_to(NBS) for p in NBS.rglob('[0-9]*.ipynb')}
    return re.sub(r'(?<!\[)`(\d\d_\w+)`', lambda m: f'[{m[0]}](/{homes[m[1]]})' if m[1] in homes else m[0], text)


def prepared(notebook):
    "A notebook as the site shows it: no cell marked hide, no nbdev line, no front matter, no progress bar."
    cells = []
    for cell in notebook['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'raw' or re.search(r'^#\s*\|\s*hide\b', source, re.M): continue
        if cell['cell_type'] == 'markdown': cells.append(cell | dict(source=_linked(source)))
        elif source := re.sub(r'^#\s*\|.*\n?', '', source, flags=re.M).strip('\n'):
            cells.append(cell | dict(source=source, outputs=_streams(cell['outputs'])))
    return notebook | dict(cells=cells)


def _markdown(text): return dict(cell_type='markdown', id='site', metadata={}, source=text)


def _module(notebook):
    "The module that a library notebook exports to, or None."
    found = (re.search(r'^#\|\s*default_exp (\S+)', ''.join(c['source']), re.M) for c in notebook['cells'])
    return next((f'lico.{f[1]}' for f in found if f), None)


def start_page():
    "The start page: the README, which is `index.ipynb` without its code and with what that code computes."
    text = re.sub(r'^<!--.*?-->\n', '', (TOP/'README.md').read_text())
    text = re.sub(r'\]\((?!https?:|#|mailto:)', '](../', text).replace('](../nbs/', '](')
    head, rest = re.split(r'(?m)^(?=!\[)', text, maxsplit=1)
    return '\n\n'.join([head, '```{include} guide/_ways.md\n```', rest, '```{include} guide/_contents.md\n```'])


def read(app, docname, source):
    "Sphinx is about to read a page: a notebook becomes what `prepared` makes of it."
    path = Path(app.env.doc2path(docname))
    if path.suffix != '.ipynb': return
    notebook = json.loads(source[0])
    if docname == 'index': notebook['cells'] = [_markdown(start_page())]
    elif module := _module(notebook):
        notebook['cells'].append(_markdown(f'Reference: [`{module}`](/api/{module}.md)'))
    source[0] = json.dumps(prepared(notebook))


# reference ------------------------------------------------------------------------------------------------------------
def _comments(source):
    "{line: text of the comment beside code or below it}"
    found, code = {}, 0
    for token in tokenize.generate_tokens(StringIO(source).readline):
        row = token.start[0]
        if token.type == tokenize.COMMENT:
            row = row if token.line[:token.start[1]].strip() else code
            found[row] = f"{found.get(row, '')} {token.string.lstrip('# ')}".strip()
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT): code = token.end[0]
    return found


def _arguments(node):
    "(name, last line) of each argument of a function, or each field of a class, and of what it returns."
    if isinstance(node, ast.ClassDef):
        return [(a.target.id, a.end_lineno) for a in node.body if isinstance(a, ast.AnnAssign)]
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = dict(zip(reversed(plain), reversed(a.defaults))) | dict(zip(a.kwonlyargs, a.kw_defaults))
    ends = [(o.arg, (defaults.get(o) or o).end_lineno) for o in [*plain, *a.kwonlyargs]]
    ends += [(o.arg, o.end_lineno) for o in (a.vararg, a.kwarg) if o]
    return ends + ([('return', node.returns.end_lineno)] if node.returns else [])


def parameters(
    obj,  # a function, a class with fields, or a class with an `__init__`
):
    "What is written beside its parameters: {name: comment}; `return` is what is written behind the arrow."
    try: source = textwrap.dedent(inspect.getsource(obj))
    except (OSError, TypeError): return {}
    comments, node = _comments(source), ast.parse(source).body[0]
    if not isinstance(node, (ast.ClassDef, ast.FunctionDef)): return {}
    lines = {line: name for name, line in _arguments(node)}  # of several on one line the last has the comment
    own = {name: comments[line] for line, name in lines.items() if line in comments}
    return own or (parameters(obj.__init__) if '__init__' in vars(obj) and isinstance(node, ast.ClassDef) else {})


def _rst(text):
    "Markdown's `code` as reStructuredText has it, and nothing else taken for markup."
    parts = re.split(r'`([^`]+)`', text)
    return ''.join(fr'\ ``{p}``\ ' if i % 2 else re.sub(r'([\\*_|`])', r'\\\1', p) for i, p in enumerate(parts))


def docstring(app, what, name, obj, options, lines):
    "The docstring with a line for each parameter that has a comment."
    lines[:] = [_rst(line) for line in lines]
    if what not in ('function', 'method', 'class'): return
    names = {'return': 'returns'}
    fields = [f":{names.get(k) or f'param {k}'}: {_rst(v)}" for k, v in parameters(obj).items()]
    if fields: lines += ['', *fields, '']


def skipped(app, what, name, obj, skip, options):
    "Public functions and classes are shown even without a docstring."
    if what == 'module' and (inspect.isroutine(obj) or inspect.isclass(obj)) and not name.startswith('_'): return False


def write_reference(app):
    "A page for each module, in a folder that git ignores; its list is `guide/api.md`."
    folder = NBS/'api'
    folder.mkdir(exist_ok=True)
    homes = {_module(json.loads(p.read_text())): p for p in NBS.rglob('[0-9]*.ipynb')}
    pages = {f'{module}.md': f'# {module}\n\nDerived in [{homes[module].stem}](/{homes[module].relative_to(NBS)}).\n\n'
                             f'```{{eval-rst}}\n.. automodule:: {module}\n```\n' for module in homes if module}
    for path in folder.iterdir():
        if path.name not in pages: path.unlink()
    for name, text in pages.items():
        if not (folder/name).exists() or (folder/name).read_text() != text: (folder/name).write_text(text)


# mathematics and how to cite ------------------------------------------------------------------------------------------
def _inline(self, node):
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _block(self, node):
    self.body.append(f"<div class='math'>{convert(node.astext(), display='block')}</div>")
    raise nodes.SkipNode


def _bibtex():
    "CITATION.cff's two entries for BibTeX."
    cff = yaml.safe_load((TOP/'CITATION.cff').read_text())
    paper = cff['preferred-citation']
    people = ' and '.join(f"{a['family-names']}, {a['given-names']}" for a in paper['authors'])
    return (f"@inproceedings{{lico,\n  title = {{{paper['title']}}},\n  author = {{{people}}},\n"
            f"  booktitle = {{{paper['collection-title']}}},\n  volume = {{{paper['volume']}}},\n"
            f"  year = {{{paper['year']}}}\n}}\n\n"
            f"@software{{lico_companion,\n  title = {{{cff['title']}}},\n  author = {{{{{cff['authors'][0]['name']}}}}},\n"
            f"  version = {{{cff['version']}}},\n  license = {{{cff['license']}}}\n}}")


myst_substitutions = dict(bibtex=f'```bibtex\n{_bibtex()}\n```')


def setup(app):
    app.add_html_math_renderer('mathml', (_inline, None), (_block, None))
    app.connect('builder-inited', write_reference)
    app.connect('source-read', read)
    app.connect('autodoc-process-docstring', docstring)
    app.connect('autodoc-skip-member', skipped)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
