"The notebooks are the source: what papermill, nbdev and a reader need of them"
import json, re
from collections import Counter
from pathlib import Path

import nbformat, papermill, pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = sorted(p for p in (ROOT/'nbs').glob('*.ipynb') if p.name[0] not in '_.') # what nbdev looks at
FIGS = [p for p in NBS if re.match(r'[1-9]\d_fig_', p.name)]
# what papermill is given parameters for
RUNNABLE = [p for p in NBS if p.name in ('04_eval.ipynb', '06_train_your_own.ipynb', '06_paper_models.ipynb',
                                         '06_your_finetune.ipynb', '07_bench.ipynb', 'demo.ipynb')] + FIGS
MAX_LINES, MAX_COLUMNS = 25, 140

def cells(path, kind='code'): # nbformat allows a cell's text as one string or as a list of lines
    "Cells of one kind, each with its text under `src`"
    nb = json.loads(path.read_text(encoding='utf-8'))
    return [dict(c, src=''.join(c['source'])) for c in nb['cells'] if c['cell_type'] == kind]

def directives(src):
    "Directives at the top of a cell, as `name -> arguments`"
    res = {}
    for line in src.splitlines():
        if not line.strip(): continue
        m = re.match(r'\s*#\s*\|\s*(\w+):?\s*(.*)', line)
        if not m: break
        res[m[1]] = m[2].strip()
    return res

def tags(cell): return cell['metadata'].get('tags', [])
def is_exported(cell): return any(o.startswith('export') for o in directives(cell['src']))
def exported(path): return [c for c in cells(path) if is_exported(c)]
def size(src): return sum(1 for o in src.splitlines() if o.strip() and not re.match(r'\s*#\s*\|', o))
def first_line(cell): return next((o for o in cell['src'].splitlines() if size(o)), '')

def module(path):
    "The module that a notebook exports, or None"
    return next((d['default_exp'] for d in (directives(c['src']) for c in cells(path)) if 'default_exp' in d), None)

def each(paths): return pytest.mark.parametrize('path', paths, ids=lambda p: p.name)

@each(NBS)
def test_valid_with_cell_ids(path):
    raw = json.loads(path.read_text(encoding='utf-8'))
    assert (raw['nbformat'], raw['nbformat_minor']) >= (4, 5), f'{path.name}: notebook format 4.5 or newer is needed, for cell ids'
    ids = Counter(c.get('id') for c in raw['cells'])
    assert None not in ids, f'{path.name}: {ids[None]} cells have no id'
    twice = [k for k, v in ids.items() if v > 1]
    assert not twice, f'{path.name}: cell ids used twice: {twice}'
    nbformat.validate(nbformat.from_dict(raw))

@each(RUNNABLE)
def test_one_parameters_cell(path):
    found = [c for c in cells(path) if 'parameters' in tags(c)]
    assert len(found) == 1, f'{path.name}: {len(found)} cells are tagged `parameters`; papermill would silently run the defaults'

@each(NBS)
def test_parameters_are_not_exported(path):
    bad = [c['id'] for c in cells(path) if 'parameters' in tags(c) and is_exported(c)]
    assert not bad, f'{path.name}: the parameters cell {bad} is exported, so its names would hide those given to papermill'

@each(NBS)
def test_no_injected_parameters(path):
    bad = [c['id'] for c in cells(path) if 'injected-parameters' in tags(c)]
    assert not bad, f'{path.name}: cells {bad} come from papermill; its output belongs in runs/'

@each(NBS)
def test_no_cell_exports_the_library(path):
    bad = [c['id'] for c in cells(path) if re.search(r'\bnb(dev)?_export\b', c['src'])]
    assert not bad, f'{path.name}: cells {bad} would rewrite dit/ during a papermill run; use `make sync`'

@each(NBS)
def test_exported_cells_are_small(path):
    bad = {f"{c['id']} ({first_line(c)})": size(c['src']) for c in exported(path)}
    bad = {k: v for k, v in bad.items() if v > MAX_LINES}
    assert not bad, f'{path.name}: exported cells of more than {MAX_LINES} lines: {bad}'

@each(NBS)
def test_code_is_read_without_scrolling(path):
    wide = [(c['id'], len(o)) for c in cells(path) for o in c['src'].splitlines() if len(o) > MAX_COLUMNS]
    assert not wide, f'{path.name}: lines of code of more than {MAX_COLUMNS} columns: {wide}'

@each(NBS)
def test_styled_tables_escape_what_models_say(path):
    bad = [c['id'] for c in cells(path) if '.style.' in c['src'] and 'escape="html"' not in c['src']]
    assert not bad, f'{path.name}: cells {bad} put text into HTML as it is; begin with .style.format(escape="html")'

@each(FIGS)
def test_figures_read_results(path):
    assert path.stem == '10_fig_method' or any('results' in c['src'] for c in cells(path)), (
        f'{path.name}: a figure notebook names the results it draws')
    assert module(path) is None and not exported(path), f'{path.name}: a figure notebook exports nothing'

def test_one_notebook_per_module():
    twice = {k: v for k, v in Counter(filter(None, map(module, NBS))).items() if v > 1}
    assert not twice, f'modules exported by more than one notebook: {twice}'

def test_every_module_has_its_notebook():
    made = {module(p).replace('.', '/') for p in NBS if module(p) and exported(p)}
    there = {p.relative_to(ROOT/'dit').with_suffix('').as_posix() for p in (ROOT/'dit').rglob('*.py')}
    there = {o for o in there if o.split('/')[-1] not in ('__init__', '_modidx')}
    assert not there-made, f'in dit/ but exported by no notebook: {sorted(there-made)}'
    assert not made-there, f'exported by a notebook but not in dit/: {sorted(made-there)}; run `make sync`'

def test_the_papers_models_say_so_where_there_is_no_network(tmp_path, monkeypatch):
    "The whole notebook by papermill, with the cell that nbdev_test leaves out"
    monkeypatch.setenv('HF_HUB_OFFLINE', '1'); monkeypatch.setenv('HF_HOME', str(tmp_path)); monkeypatch.setenv('PYTHONPATH', str(ROOT))
    papermill.execute_notebook(ROOT/'nbs'/'06_paper_models.ipynb', tmp_path/'out.ipynb', progress_bar=False,
                               cwd=ROOT/'nbs', kernel_name='python3')
    said = ''.join(''.join(o.get('text', '')) for o in cells(tmp_path/'out.ipynb')[-1]['outputs'])
    assert said.startswith("not run here: could not load the base model 'Qwen/Qwen3-4B'"), said
