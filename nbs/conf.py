"""The site: these notebooks as they are stored, nothing is run, and the package's docstrings with the comments beside
their parameters. `sphinx-build -qW nbs _docs/html` (Quarto, nbdev's own way, cannot be installed everywhere)."""
import ast, importlib.util, inspect, json, logging, re, shutil, textwrap, tokenize
from io import StringIO
from pathlib import Path

import yaml
from docutils import nodes
from fontTools import subset
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
nb_code_prompt_show, nb_code_prompt_hide = 'Show the setup', 'Hide the setup'
nb_render_markdown_format = 'myst'
nb_ipywidgets_js = {}  # no widget, no script from another host
myst_enable_extensions = ['dollarmath', 'substitution']
myst_heading_anchors = 3
myst_update_mathjax = False

autodoc_default_options = dict(members=True) | {'member-order': 'bysource'}
autodoc_preserve_defaults, autodoc_inherit_docstrings = True, False
autodoc_typehints = 'none'
add_module_names = False

html_theme, html_title = 'furo', f'lico {release}'
html_math_renderer = 'mathml'
html_static_path, html_css_files = ['_static'], ['site.css']
highlight_language = 'none'  # what is laid out in columns is no Python
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
        data = o.get('data', {})
        if 'text/markdown' in data: data['text/markdown'] = ''.join(data['text/markdown']).replace(' ± ', '\xa0±\xa0')
    return [o for o in kept if o.get('name') != 'stderr' or o['text']]


def _linked(text):
    "Prose whose links work here: headings in small letters, and notebooks that are named by their number."
    text = re.sub(r'(?<=\]\()([^)\s#]*#)([^)\s]+)', lambda m: m[1] + m[2].lower(), text)
    named = {p.stem: p.relative_to(NBS) for p in homes.values()}
    return re.sub(r'(?<!\[)`(\d\d_\w+)`', lambda m: f'[{m[0]}](/{named[m[1]]})' if m[1] in named else m[0], text)


def _fold_away(cells):
    "The parameters of a result notebook and the imports behind them open on a click."
    code = [c for c in cells if c['cell_type'] == 'code']
    if not code or 'parameters' not in code[0]['metadata'].get('tags', []): return
    for cell in code[:2]: cell['metadata'] = dict(tags=['hide-input'])


def prepared(notebook):
    "A notebook as the site shows it: no cell marked hide, no nbdev line, no front matter, no progress bar."
    cells = []
    for cell in notebook['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'raw' or re.search(r'^#\s*\|\s*hide\b', source, re.M): continue
        if cell['cell_type'] == 'markdown': cells.append(cell | dict(source=_linked(source)))
        elif source := re.sub(r'^#\s*\|.*\n?', '', source, flags=re.M).strip('\n'):
            cells.append(cell | dict(source=source, outputs=_streams(cell['outputs'])))
    _fold_away(cells)
    return notebook | dict(cells=cells)


def _markdown(text): return dict(cell_type='markdown', id='site', metadata={}, source=text)


def _module(notebook):
    "The module that a library notebook exports to, or None."
    found = (re.search(r'^#\|\s*default_exp (\S+)', ''.join(c['source']), re.M) for c in notebook['cells'])
    return next((f'lico.{f[1]}' for f in found if f), None)


def start_page():
    "The start page: the README, which is `index.ipynb` without its code and with what that code computes."
    text = re.sub(r'^<!--.*?-->\n', '', (TOP/'README.md').read_text(encoding='utf-8'))
    text = re.sub(r'\]\((?!https?:|#|mailto:)', '](../', text).replace('](../nbs/', '](')
    head, rest = re.split(r'(?m)^(?=!\[)', text, maxsplit=1)
    return '\n\n'.join([head, '```{include} guide/_ways.md\n```', rest, '```{include} guide/_contents.md\n```'])


# the page to look at --------------------------------------------------------------------------------------------------
LOOKING = TOP/'figures'/'looking'


def looking(text, shown):
    "The page `guide/look` with its numbers and what its networks are, both from `looking.json`."
    data = json.loads(shown)
    networks = [f'* **{n["title"]}** (`{n["name"]}`): {n["says"]}; {n["accuracy"]:.1f} % of its test images right'
                for n in data['networks']]
    about = (f'All are {data["backbone"]} as block {data["block"]} of [the programme](../protocol.ipynb) has it, on '
             f'{data["dataset"]} at {data["pixels"]} pixels, and depart from what is declared: '
             f'{"; ".join(data["departures"])}.')
    return text.replace('{{ looked_at }}', '\n'.join([about, '', *networks])).replace(
        '{{ looking }}', shown.strip().replace('</', '<\\/'))


def look_files(app, pagename, templatename, context, doctree):
    "Script and style of the page to look at, for that page alone."
    if pagename != 'guide/look': return
    app.add_js_file('look.js', loading_method='defer')
    app.add_css_file('look.css')


def write_sheets(app, error):
    "The pictures of the page to look at."
    folder = Path(app.outdir)/'_static'/'looking'
    folder.mkdir(exist_ok=True)
    for path in LOOKING.glob('maps-*'): shutil.copy(path, folder)


def read(app, docname, source):
    """Sphinx is about to read a page: a notebook becomes what `prepared` makes of it, and the page to look at gets its
    numbers."""
    path = Path(app.env.doc2path(docname))
    if docname == 'guide/look':
        app.env.note_dependency(str(LOOKING/'looking.json'))
        source[0] = looking(source[0], (LOOKING/'looking.json').read_text(encoding='utf-8'))
    if path.suffix != '.ipynb': return
    notebook = json.loads(source[0])
    if docname == 'index':
        notebook['cells'] = [_markdown(start_page())]
        app.env.note_dependency(str(TOP/'README.md'))
    elif module := _module(notebook):
        notebook['cells'].append(_markdown(f'Reference: [`{module}`](/api/{module}.md)'))
    source[0] = json.dumps(prepared(notebook))


# {module: its notebook}, in reading order
homes = {_module(json.loads(p.read_text(encoding='utf-8'))): p for part in ('method', 'evidence')
         for p in sorted((NBS/part).glob('[0-9]*.ipynb'))}


# reference ------------------------------------------------------------------------------------------------------------
def _comments(source):
    "Two of {line: comment}: beside the code of that line, and on lines of its own above it."
    beside, above, waiting = {}, {}, []
    for token in tokenize.generate_tokens(StringIO(source).readline):
        (row, column), text = token.start, token.string.lstrip('# ')
        if token.type == tokenize.COMMENT:
            if token.line[:column].strip(): beside[row] = text
            else: waiting.append(text)
        elif waiting and token.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            above[row], waiting = ' '.join(waiting), []
    return beside, above


def _arguments(node):
    "(name, first line, last line) of each argument of a function, or each field of a class."
    if isinstance(node, ast.ClassDef):
        return [(a.target.id, a.lineno, a.end_lineno) for a in node.body if isinstance(a, ast.AnnAssign)]
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    default = dict(zip(reversed(plain), reversed(a.defaults))) | dict(zip(a.kwonlyargs, a.kw_defaults))
    return [(o.arg, o.lineno, (default.get(o) or o).end_lineno)
            for o in [*plain, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])] if o.arg != 'self']


def parameters(
    obj,  # a function, a class with fields, or a class with an `__init__`
):  # {name: comment}; names on one line share theirs, "a, b"; `return` has what is written behind the last bracket
    "What is written beside its parameters, or above them."
    try: source = textwrap.dedent(inspect.getsource(obj))
    except (OSError, TypeError): return {}
    (beside, above), node = _comments(source), ast.parse(source).body[0]
    if not isinstance(node, (ast.ClassDef, ast.FunctionDef)): return {}
    lines = {}
    for name, start, end in _arguments(node): lines.setdefault(end, []).append((name, start))
    found = {', '.join(name for name, _ in names): text for end, names in lines.items()
             if (text := beside.get(end) or above.get(names[0][1]))}
    if isinstance(node, ast.ClassDef): return found or (parameters(obj.__init__) if '__init__' in vars(obj) else {})
    behind = [text for row, text in beside.items() if max(lines, default=0) < row < node.body[0].lineno]
    return found | ({'return': behind[0]} if behind else {})


def _rst(text):
    "Markdown's `code` as reStructuredText has it, and nothing else taken for markup."
    parts = re.split(r'`([^`]+)`', text)
    return ''.join(fr'\ ``{p}``\ ' if i % 2 else re.sub(r'([\\*_|`])', r'\\\1', p) for i, p in enumerate(parts))


def _blocks(text):
    "The paragraphs of a docstring; what is laid out in columns stays as it is."
    for block in re.split(r'\n\s*\n', text.strip()):
        lines = block.split('\n')
        laid_out = any(re.search(r'^\s|\S  +\S', line) for line in lines)
        yield from ['::', '', *(f'    {line}' for line in lines), ''] if laid_out else [*map(_rst, lines), '']


def docstring(app, what, name, obj, options, lines):
    "The docstring with a line for each parameter that has a comment."
    lines[:] = _blocks('\n'.join(lines))
    if what not in ('function', 'method', 'class'): return
    found = parameters(obj)
    back = found.pop('return', None)
    if found: lines += ['', ':Parameters:', *(f"    * {_rst(f'`{k}`')} -- {_rst(v)}" for k, v in found.items()), '']
    if back: lines += ['', f':Returns: {_rst(back)}', '']


def skipped(app, what, name, obj, skip, options):
    "Public functions and classes are shown even without a docstring."
    if what == 'module' and (inspect.isroutine(obj) or inspect.isclass(obj)) and not name.startswith('_'): return False


def write_reference(app):
    "A page for each module, in a folder that git ignores; none for a page that is built alone."
    if app.config.root_doc != root_doc: return
    folder = NBS/'api'
    folder.mkdir(exist_ok=True)
    pages = {f'{module}.md': f'# {module}\n\nDerived in [{path.stem}](/{path.relative_to(NBS)}).\n\n'
                             f'```{{eval-rst}}\n.. automodule:: {module}\n```\n' for module, path in homes.items()}
    for path in folder.iterdir():
        if path.name not in pages: path.unlink()
    for name, text in pages.items():
        if not (folder/name).exists() or (folder/name).read_text(encoding='utf-8') != text: (folder/name).write_text(text, encoding='utf-8')


# mathematics and how to cite ------------------------------------------------------------------------------------------
def mathml(text, display='inline'):
    "TeX as MathML, which browsers set themselves: no script, and a screen reader reads it."
    text = re.sub(r'\\(math[a-z]+|tilde|bar) ([A-Za-z])(?![A-Za-z])', r'\\\1{\2}', text)  # arguments in braces
    return convert(re.sub(r'\\[lr]?Vert(?![A-Za-z])', '‖', text), display=display)


def _inline(self, node):
    self.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def _block(self, node):
    self.body.append(f"<div class='math'>{mathml(node.astext(), 'block')}</div>")
    raise nodes.SkipNode


def write_font(app, error):
    "STIX Two Math, for machines without a font that can set mathematics; the package ziamath has it."
    logging.getLogger('fontTools').setLevel('WARNING')
    folder = Path(importlib.util.find_spec('ziamath').origin).parent/'fonts'
    options = subset.Options(flavor='woff', layout_features=['ssty', 'math'])
    font, part = subset.load_font(folder/'STIXTwoMath-Regular.ttf', options), subset.Subsetter(options)
    part.populate(unicodes=[o for first, last in ((0x20, 0x3ff), (0x2000, 0x22ff), (0x2308, 0x230b), (0x27e8, 0x27e9),
                                                  (0x1d400, 0x1d7ff)) for o in range(first, last + 1)])
    part.subset(font)
    if not error: subset.save_font(font, Path(app.outdir)/'_static'/'math.woff', options)


def _bibtex():
    "CITATION.cff's two entries for BibTeX."
    cff = yaml.safe_load((TOP/'CITATION.cff').read_text(encoding='utf-8'))
    paper = cff['preferred-citation']
    people = ' and '.join(f"{a['family-names']}, {a['given-names']}" for a in paper['authors'])
    entries = dict(
        inproceedings=('lico', dict(title=paper['title'], author=people, booktitle=paper['collection-title'],
                                    volume=paper['volume'], year=paper['year'])),
        software=('lico_companion', dict(title=cff['title'], author=f"{{{cff['authors'][0]['name']}}}",
                                         version=cff['version'], license=cff['license'])))
    return '\n\n'.join(f'@{kind}{{{key},\n' + ',\n'.join(f'  {k} = {{{v}}}' for k, v in fields.items()) + '\n}'
                       for kind, (key, fields) in entries.items())


_entries = '\n'.join(f'/api/{module}' for module in homes)
myst_substitutions = dict(bibtex=f'```bibtex\n{_bibtex()}\n```',
                          modules=f'```{{toctree}}\n:maxdepth: 1\n\n{_entries}\n```')


def setup(app):
    app.add_html_math_renderer('mathml', (_inline, None), (_block, None))
    app.connect('builder-inited', write_reference)
    app.connect('source-read', read)
    app.connect('build-finished', write_font)
    app.connect('build-finished', write_sheets)
    app.connect('html-page-context', look_files)
    app.connect('autodoc-process-docstring', docstring)
    app.connect('autodoc-skip-member', skipped)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
