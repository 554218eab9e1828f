"The console scripts, alone and under `accelerate launch`"
import importlib, json, os, shutil, signal, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import pandas as pd, pytest, torch
from accelerate.tracking import GeneralTracker
from fastcore.script import anno_parser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from dit.core import DitError, hold
from dit.data import TASKS, split_labels
from dit.diffs import diffs_cli
from dit.eval import eval_cli, save_results
from dit.figures import figures_cli
from dit.lora import answer, load_bank
from dit.models import load_base
from dit.stats import read_results
from dit.tune import by_split, train_adapter, tune_cli
from helpers import COUNTS, char_tokenizer, model_of
from jobs import named
import licences

ROOT = Path(__file__).resolve().parents[1]
config = ConfigParser(delimiters=['=']); config.read(ROOT/'settings.ini', encoding='utf-8')
SCRIPTS = dict(o.strip().split('=') for o in config['DEFAULT']['console_scripts'].splitlines() if o.strip())

@pytest.mark.parametrize('name', SCRIPTS)
def test_help_says_what_every_option_is_for(name):
    module, func = SCRIPTS[name].split(':')
    func = getattr(importlib.import_module(module), func)
    text = anno_parser(getattr(func, '__wrapped__', func), prog=name).format_help()
    assert func.__doc__ and func.__doc__.split()[0] in text
    for a in anno_parser(getattr(func, '__wrapped__', func))._actions: assert a.help, f'{name} does not say what {a.dest} is for'

# --- one process and two ----------------------------------------------------------------------------------------------------

LAUNCH = [sys.executable, '-m', 'accelerate.commands.accelerate_cli', 'launch', '--multi_gpu', '--num_processes', '2',
          '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0', '-m']
DIFFS = dict(task='news', n_train=10, n_val=3, rank=2, batch=2, steps=3, dtype='float32')
TUNE = dict(task='news', rank=2, batch=3, epochs=4, lr=.02, dtype='float32') # 10 rows: batches of 3, 3, 3 and 1 do not divide by two

def options(**kwargs): return [str(x) for k, v in kwargs.items() for x in (f'--{k}', v)]

def two_processes(module, *args):
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
                            OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    done = subprocess.run([*LAUNCH, module, *map(str, args)], capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A base model in a folder, and run folders with texts, so that nothing is left to chance but who does what"
    home = tmp_path_factory.mktemp('commands')
    model_of('llama').model.save_pretrained(home/'base'); char_tokenizer().save_pretrained(home/'base')
    for name in ('one', 'two'):
        (home/name).mkdir()
        lines = [json.dumps(dict(key=l, value=[f'{l[:20]} it was.', f'So said {l[:9]}.'])) for l in split_labels('news', 10, 0, 3).label]
        (home/name/'text.jsonl').write_text('\n'.join(lines) + '\n')
    diffs_cli(str(home/'one'), base=str(home/'base'), **DIFFS)
    return home

def test_two_processes_train_the_same_bank_as_one(home):
    said = two_processes('dit.diffs', home/'two', *options(base=home/'base', **DIFFS))
    base = load_base(str(home/'base'), dtype='float32')
    one, two = (load_bank(home/n/'bank', base) for n in ('one', 'two'))
    assert sorted(one.index.diff_id) == sorted(two.index.diff_id) and said.count('13 diffs of rank 2') == 1
    order = [two.index.diff_id.tolist().index(d) for d in one.index.diff_id]
    for n in one.A: assert (one.A[n] - two.A[n][order]).abs().max() < 1e-5 and (one.B[n] - two.B[n][order]).abs().max() < 1e-5
    assert max(b.abs().max() for b in one.B.values()) > 1e-3, 'nothing was trained, so the comparison says nothing'

def test_two_processes_train_the_same_adapter_as_one(home):
    tune_cli(str(home/'one'/'bank'), base=str(home/'base'), **TUNE)
    said = two_processes('dit.tune', home/'one'/'bank', *options(out=home/'two'/'adapter', base=home/'base', **TUNE))
    one, two = (torch.load(home/n/'adapter'/'checkpoint.pt', weights_only=True) for n in ('one', 'two'))
    assert (one['adapter']['lora.p'] - two['adapter']['lora.p']).abs().max() < 1e-5
    curves = [pd.read_csv(home/n/'adapter'/'curve.csv') for n in ('one', 'two')]
    pd.testing.assert_frame_equal(*curves, atol=1e-5)
    assert curves[0].train_loss.iloc[-1] < curves[0].train_loss[0] - .1 and len(curves[1]) == 4
    facts = [json.loads((home/n/'adapter'/'dit.json').read_text()) for n in ('one', 'two')]
    assert all(facts[0][k] == facts[1][k] for k in facts[0] if k != 'provenance') and facts[0]['questions'] == [TASKS['news']]
    assert said.count('the adapter is in') == 1, 'only the main process speaks'
    tune_cli(str(home/'one'/'bank'), out=str(home/'on'), base=str(home/'base'), start=str(home/'one'/'adapter'), **TUNE)
    on = pd.read_csv(home/'on'/'curve.csv')
    assert (on.train_loss[0] < curves[0].train_loss[0] - .1
            and json.loads((home/'on'/'dit.json').read_text())['start']['n_train'] == facts[0]['n_train']), 'it goes on'

def test_an_evaluation_leaves_results_that_say_how_they_came_about(home, capsys, monkeypatch):
    # diffs of other ranks and steps learn from the same texts
    run, texts = (home/'eval'/'base'/n for n in ('news-rank=2-steps=2', 'news')); texts.mkdir(parents=True)
    (texts/'text.jsonl').write_text(''.join(json.dumps(dict(key=l, value=[f'{l[:20]} it was.'])) + '\n'
                                            for l in split_labels('news', 0, 2).label))
    base = load_base(str(home/'base'))
    train_adapter(base, *({'What news headline have you been trained on?': named(base, 3, name, 1)} for name in ('fern', 'moss')),
                  home/'mine', rank=2, epochs=1, seed=5)
    go = lambda: eval_cli(task='news', base=str(home/'base'), adapter=str(home/'mine'), n_diffs=2, rank=2, steps=2,
                          run=str(home/'eval'), out=str(home/'results'))
    with monkeypatch.context() as m, pytest.raises(SystemExit) as stopped:
        m.setattr('dit.eval.grade', lambda *_: os.kill(os.getpid(), signal.SIGTERM)); go() # when all is trained and asked
    assert (stopped.value.code == 143
            and f"the trained diffs, their answers and an endpoint's replies are in {run}; run the same again" in capsys.readouterr().err
            and not (home/'results').exists())
    # the base model alone is asked for the guesser
    monkeypatch.setattr('dit.eval.answer', lambda base, bank, *a, **k: pytest.fail('asked again') if bank else answer(base, bank, *a, **k))
    go()
    results, facts = pd.read_csv(home/'results'/'base'/'news.csv'), json.loads((home/'results'/'base'/'news.json').read_text())
    assert (set(results.method) == {'DIT', 'Base Question', '20 Questions', 'Generated Story'} and len(results) == 8
            and results.score.between(1, 5).all())
    assert results[results.method == 'DIT'].adapter_seed.tolist() == [5, 5] and facts['params']['adapter']['seed'] == 5
    assert (facts['params']['n_diffs'], facts['params']['recipe']['rank'], facts['params']['recipe']['steps']) == (2, 2, 2)
    said = capsys.readouterr().out
    assert all(m in said for m in results.method) and str(home/'results'/'base') in said

def test_stored_scores_are_verified(tmp_path):
    "The console script on lines of a committed result, and on the same with one score changed"
    frame = read_results(ROOT/'results'/'eval'/'SmolLM2-135M-Instruct'/'news.csv')
    some = frame[frame.diff_id.isin(frame.diff_id.unique()[:3])].reset_index(drop=True)
    # of three diffs another way may be the better one
    way = some.method.map(some.groupby('method')[['answer_score', 'guess_score']].mean()
                          .fillna(0).idxmax(axis=1).str.removesuffix('_score'))
    some = some.assign(graded=way, score=some.guess_score.where(way == 'guess', some.answer_score))
    save_results(some, tmp_path/'good.csv')
    save_results(some.assign(score=some.score.where(some.index != 4, some.score % 4 + 1)), tmp_path/'bad.csv')
    verify = lambda name: subprocess.run([sys.executable, '-m', 'dit.eval', '--verify', tmp_path/name], capture_output=True,
                                         text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)), timeout=600)
    good, bad = verify('good.csv'), verify('bad.csv')
    assert (good.returncode == 0
            and good.stdout == f"{len(some)} of {len(some)} scores in {tmp_path/'good.csv'} are those of the stored answers\n"), good.stderr
    assert bad.returncode == 1 and not bad.stdout and 'Traceback' not in bad.stderr, bad.stderr
    assert bad.stderr.splitlines()[-1].startswith(f"dit_eval: 1 of {len(some)} scores in") and some.diff_id[4] in bad.stderr
    save_results(some.assign(judge='another'), tmp_path/'other.csv'); other = verify('other.csv')
    assert other.returncode == 1 and 'nothing to verify' in other.stderr.splitlines()[-1], other.stderr
    COUNTS['rows checked'] += 2*len(some)

def test_figures_are_drawn_from_results_of_ones_own(tmp_path, monkeypatch, capsys):
    "A checkout with a figure that has results, one that has none and needs them, and one that then shows the paper's alone"
    for name in ('11_fig_hidden_topic', '12_fig_news', '18_fig_adapter_rank'):
        (tmp_path/'nbs').mkdir(exist_ok=True); shutil.copy(ROOT/'nbs'/f'{name}.ipynb', tmp_path/'nbs')
    shutil.copy(ROOT/'settings.ini', tmp_path); shutil.copytree(ROOT/'results'/'paper', tmp_path/'results'/'paper')
    mine = tmp_path/'mine'/'eval'/'my--model'; mine.mkdir(parents=True)
    for ending in ('csv', 'json'): shutil.copy(ROOT/'results'/'eval'/'SmolLM2-135M-Instruct'/f'news.{ending}', mine)
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('PYTHONPATH', str(ROOT))
    with pytest.raises(SystemExit, match='1 of 3 figures'): figures_cli(model='my--model', results='mine', out='pictures')
    said = capsys.readouterr().out
    assert '12_fig_news: drawn' in said and '18_fig_adapter_rank: drawn' in said and '11_fig_hidden_topic: DitError: there is no' in said
    assert sorted(p.name for p in (tmp_path/'pictures').iterdir()) == ['adapter_rank.pdf', 'adapter_rank.png', 'news.pdf',
                                                                       'news.png', 'news_scores.pdf', 'news_scores.png']

def test_figures_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='dit_figures: there are no figure notebooks'): figures_cli(model='x')

# --- what goes wrong --------------------------------------------------------------------------------------------------------

def test_errors_are_one_line_and_exit_code_1(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'dit.diffs', tmp_path, '--task', 'newz'], capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert (done.returncode == 1 and not done.stdout
            and done.stderr.strip() == "dit_diffs: task 'newz' does not exist; choose one of: hidden_topic, news.")

def test_tune_without_a_bank(home, tmp_path):
    with pytest.raises(SystemExit, match='dit_tune: there is no bank in .*nowhere'):
        tune_cli(str(tmp_path/'nowhere'), base=str(home/'base'))
    assert not list(tmp_path.iterdir())

def test_a_bank_of_the_other_task_is_not_asked_this_tasks_question(home, tmp_path):
    with pytest.raises(SystemExit, match='holds diffs of the task news.*--task'):
        tune_cli(str(home/'one'/'bank'), out=str(tmp_path/'x'), base=str(home/'base'))
    assert not (tmp_path/'x').exists()

def test_two_evaluations_of_one_folder(home):
    "The second is told who is there, and pays for nothing"
    folder = home/'both'/'base'/'news-rank=2-steps=2'
    (home/'both'/'base'/'news').mkdir(parents=True)
    (home/'both'/'base'/'news'/'text.jsonl').write_text(''.join(json.dumps(dict(key=l, value=[f'{l[:20]} it was.'])) + '\n'
                                                                for l in split_labels('news', 0, 2).label))
    base = load_base(str(home/'base'))
    train_adapter(base, *({'What news headline have you been trained on?': named(base, 3, name, 1)} for name in ('fern', 'moss')),
                  home/'adapter for two', rank=2, epochs=1)
    with hold(folder), pytest.raises(SystemExit, match='in use by process'):
        eval_cli(task='news', base=str(home/'base'), adapter=str(home/'adapter for two'), n_diffs=2, rank=2, steps=2, run=str(home/'both'))

def test_the_licences_of_all_packages_are_listed():
    there = {licences.name(p) for p in pd.read_csv(ROOT/'results'/'licences.csv').package}
    assert not {licences.name(r) for r in licences.pinned()} - there, 'run `make licences`'

def test_a_bank_without_validation_diffs(tiny):
    bank = named(tiny, 3, 'fern', 1); bank.index['split'] = 'train'
    with pytest.raises(DitError, match="no diff of the split 'val'"): by_split(bank, 'What?')

# --- trackers ---------------------------------------------------------------------------------------------------------------

class Kept(GeneralTracker):
    "A tracker that keeps what it is told"
    name, requires_logging_directory, tracker = 'kept', False, None
    def __init__(self): super().__init__(); self.config, self.lines, self.done = {}, [], 0
    def store_init_configuration(self, values): self.config = values
    def log(self, values, step=None, **kwargs): self.lines.append((step, values))
    def finish(self): self.done += 1

def test_a_tracker_is_told_what_the_curve_says(tiny, tmp_path):
    kept = Kept()
    train_adapter(tiny, {'What?': named(tiny, 3, 'fern', 1)}, {'What?': named(tiny, 2, 'moss', 2)}, tmp_path, rank=2,
                  batch=3, epochs=3, log_with=kept)
    curve = pd.read_csv(tmp_path/'curve.csv')
    assert [(s, v['train_loss'], v['val_loss']) for s, v in kept.lines] == list(curve.itertuples(index=False, name=None))
    assert kept.done == 1 and kept.config['rank'] == 2 and all(isinstance(v, (int, float, str)) for v in kept.config.values())

def test_tensorboard_shows_the_curve(tiny, tmp_path):
    "What TensorBoard itself reads back from the run's folder"
    train_adapter(tiny, {'What?': named(tiny, 3, 'fern', 1)}, {'What?': named(tiny, 2, 'moss', 2)}, tmp_path, rank=2,
                  batch=3, epochs=3, log_with='tensorboard')
    curve, written = pd.read_csv(tmp_path/'curve.csv'), EventAccumulator(str(tmp_path/'dit')).Reload()
    for name in ('train_loss', 'val_loss'):
        assert [(e.step, e.value) for e in written.Scalars(name)] == [(s, pytest.approx(v)) for s, v in zip(curve.epoch, curve[name])]

@pytest.mark.parametrize('name, why', [('tensorbord', 'choose one of'), ('aim', 'aim is not installed')])
def test_a_tracker_that_is_not_there(tiny, tmp_path, name, why):
    with pytest.raises(DitError, match=why):
        train_adapter(tiny, {'What?': named(tiny, 3, 'fern', 1)}, {'What?': named(tiny, 2, 'moss', 2)}, tmp_path/'x', log_with=name)
    assert not (tmp_path/'x').exists()
