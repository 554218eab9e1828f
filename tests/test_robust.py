"Nothing is lost, nothing unsafe is run, nothing fails silently"
import contextlib, errno, json, multiprocessing, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path

import pandas as pd, pytest, torch
from execnb.nbio import mk_cell, new_nb, write_nb
from execnb.shell import CaptureShell
from hypothesis import given, settings, strategies as st
from dit.core import *
from dit.core import plain
from dit.eval import add_guesses, ask_agent, ask_all, grade, save_results
from dit.llm import LLMGuesser, LLMJudge
from dit.lora import read_index
from dit.writers import EndpointWriter, load_texts
from helpers import COUNTS, KEY, call, completion, endpoint, finish, no_key, script, start
import jobs, strangers

@contextlib.contextmanager
def at_most(seconds):
    "Fails instead of hanging"
    def stop(*_): raise TimeoutError('it hangs')
    before = signal.signal(signal.SIGALRM, stop); signal.alarm(seconds)
    try: yield
    finally: signal.alarm(0); signal.signal(signal.SIGALRM, before)

# --- files from strangers -----------------------------------------------------------------------------------------------------

LONG = bool(os.environ.get('DIT_SOAK')) # set by `make soak`: 20 kills a stage and every operation on files, here a sample of both
CASES = list(strangers.cases())

@pytest.fixture(scope='module')
def good(tiny, tmp_path_factory):
    "One good file or folder per reader"
    root = tmp_path_factory.mktemp('good')
    for name, (make, _, _) in strangers.READERS.items(): make(root/name, tiny)
    return root

def same(a, b):
    "Was the same read?"
    if isinstance(a, pd.DataFrame): return a.equals(b)
    if hasattr(a, 'A'): return a.index.equals(b.index) and all(torch.equal(a.A[n], b.A[n]) and torch.equal(a.B[n], b.B[n]) for n in a.A)
    return same(a[0], b[0]) if isinstance(a, tuple) else a == b

def read(reader, folder, base):
    with at_most(60): return strangers.READERS[reader][1](folder, base)

@pytest.mark.parametrize('reader', strangers.READERS)
def test_what_is_whole_is_read(reader, good, tiny): assert same(read(reader, good/reader, tiny), read(reader, good/reader, tiny))

def most():
    "The most memory that this process has held since `forget_most`, in kB"
    return next(int(l.split()[1]) for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('VmHWM'))

def forget_most():
    "From now on only; where the kernel does not let us, since the process began"
    with contextlib.suppress(OSError): Path('/proc/self/clear_refs').write_text('5')

def refused(reader, folder, base):
    "True for a `DitError` of one line, False when it was read; anything else fails"
    forget_most(); before = most()
    try: read(reader, folder, base); error = None
    except DitError as e: error = str(e)
    assert most() - before < 200_000, 'more than 200 MB were taken'
    assert not list(folder.parent.glob('was-here')), 'code in the file was run'
    if error: assert error == plain(error) and '\n' not in error and 20 < len(error) <= 1000, error
    return bool(error)

# What is read all the same, by name: a few flipped bits may be harmless; torn lines of texts and replies are left out and their
# work done again; a table cut between two lines is a shorter table; weights of any kind of number
# are converted; a square matrix does not show that it was turned; and some damage is none. All else must be refused.
HARMLESS = dict(
    base=('config.json: crlf', 'tokenizer.json: crlf', 'tokenizer_config.json: crlf', 'tokenizer_config.json: missing',
          'tokenizer_config.json: a folder', 'tensors: int64', 'tensors: bool', 'tensors: float8', 'tensors: complex',
          'tensors: transposed'),
    table=('labels.csv: twice', 'labels.csv: bom', 'labels.csv: crlf', 'labels.csv: column twice', 'labels.csv: nul'),
    bank=('bank.json: bom', 'bank.json: crlf', 'index.csv: cut 0', 'index.csv: cut 3', 'index.csv: bom',
          'index.csv: crlf', 'learnt is not known', 'mixed'),
    peft=('adapter_config.json: bom', 'adapter_config.json: crlf', 'alpha missing', 'alpha 0', 'alpha below 0',
          'remote code', 'base with steering', 'base a list'),
    full=('tensors: transposed', 'tensors: one missing'),
    paper=('index.csv: twice', 'index.csv: bom', 'index.csv: crlf', 'weight-diffs/weight-diff-000.pt: longer',
           'weight-diffs/weight-diff-000.pt: twice', 'index.csv: row other digits'),
    adapter=('a.pt: longer', 'a.pt: twice'),
    checkpoint=('checkpoint.pt: longer', 'checkpoint.pt: twice', 'checkpoint.pt: missing'),
    results=('news.csv: longer', 'news.csv: cut 0', 'news.csv: bom', 'news.csv: crlf', 'news.csv: nul'))
def may_be_read(reader, name): return reader in ('texts', 'replies') or ': flip ' in name or name in HARMLESS[reader]

@pytest.mark.parametrize('reader, name, damage', CASES, ids=[f'{r}, {n}'.encode('ascii', 'backslashreplace').decode() for r, n, _ in CASES])
def test_broken_files(reader, name, damage, good, tiny, tmp_path):
    shutil.copytree(good/reader, tmp_path/'x')
    damage(tmp_path/'x', tiny)
    no = refused(reader, tmp_path/'x', tiny)
    assert no or may_be_read(reader, name), 'it was read'
    COUNTS['broken inputs refused' if no else 'broken inputs read all the same'] += 1

@settings(max_examples=40)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=5))
def test_any_text_goes_through_a_table(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp('t')/'a.csv'
    write_csv(path, pd.DataFrame(dict(label=texts, n=range(len(texts)))))
    back = from_cells(pd.read_csv(path, dtype=dict(label=str), keep_default_na=False))
    assert back.label.tolist() == [t.encode('utf-8', 'backslashreplace').decode() for t in texts]

@pytest.mark.parametrize('text', strangers.ODD)
def test_text_is_data_wherever_it_goes(text, tmp_path):
    frame = pd.DataFrame(dict(label=[text]))
    write_csv(tmp_path/'a.csv', frame)
    cell = pd.read_csv(tmp_path/'a.csv', dtype=str, keep_default_na=False).label[0]
    assert cell[:1] not in ('=', '+', '-', '@', '\t', '\r') and from_cells(frame.assign(label=cell)).label[0] == text
    assert '<script' not in frame._repr_html_(), 'HTML in a notebook'
    assert not set(plain(text)) & {'\x1b', '\x07', '\u202e', '\r'} and '\x1b' not in str(DitError(text))

# --- killed ---------------------------------------------------------------------------------------------------------------------

def content(folder):
    "What a run left, but for dates"
    out = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*'))
           if p.is_file() and not p.name.startswith('.') and '.claims' not in p.parts and p.name not in ('replies.jsonl', 'answers.jsonl')}
    for name in [n for n in out if n.endswith('.json')]:
        out[name] = {k: v for k, v in json.loads(out[name]).items() if k not in ('provenance', 'date', 'params')}
    return {n: c for n, c in out.items() if n != 'checkpoint.pt'}

def litter(folder): return [p for p in folder.rglob('*.tmp')] + [p for p in folder.rglob('.claims/*')]

def paid_server(server):
    server.content = lambda request, n: completion(
        request, '3' if 'Grade how' in str(request) or 'sum up' in str(request) else f"a story of {len(str(request))}")
    return server

STAGES = dict(write=(jobs.stage_write, False), pay=(jobs.stage_pay, True), diffs=(jobs.stage_diffs, False),
              adapter=(jobs.stage_adapter, False), evaluation=(jobs.stage_eval, True))

@pytest.mark.parametrize('stage', STAGES)
def test_killed_at_random_moments(stage, server, tmp_path, kills=20 if LONG else 5):
    "Killed again and again, and started again: the same files; twice only what was in hand"
    job, paying = STAGES[stage]
    url, r = [paid_server(server).url] if paying else [], random.Random(stage)
    log, folder = tmp_path/'log', tmp_path/'run'
    finish(start(job, tmp_path/'warm', tmp_path/'log', *url)); server.seen.clear(); log.unlink(missing_ok=True) # the fork server is up
    began = time.monotonic(); finish(start(job, tmp_path/'whole', tmp_path/'log whole', *url)); span = time.monotonic() - began
    once = len(server.seen) if paying else len((tmp_path/'log whole').read_text().split('\n')) - 1
    want, killed, runs = content(tmp_path/'whole'), 0, 0
    assert once > 2 and want
    for _ in range(300):
        p, moment = start(job, folder, log, *url), r.uniform(0, span)
        p.join(moment)
        if p.is_alive(): os.kill(p.pid, signal.SIGKILL)
        p.join()
        if p.exitcode == -signal.SIGKILL:
            killed += 1
            [json.loads(f.read_bytes()) for f in folder.rglob('*.json') if not f.name.startswith('.') and '.claims' not in f.parts]
        else:
            assert p.exitcode == 0 and content(folder) == want; runs += 1
            if killed >= kills: break
            shutil.rmtree(folder)
    assert killed >= kills and not litter(folder)
    begun = len(server.seen) - once if paying else len(log.read_text().splitlines())
    assert begun <= runs*once + 2*killed, 'more was done twice than was in hand'
    if not paying: assert 'AGAIN' not in log.read_text(), 'what was in the bank was trained again'
    COUNTS['kills survived'] += killed

@pytest.mark.parametrize('stage', STAGES)
def test_a_fault_at_every_operation_on_files(stage, server, tmp_path):
    "No space, no permission, or killed, at the k-th operation, for every k: an error of one line, and the next run ends as it should"
    job, paying = STAGES[stage]
    url = [paid_server(server).url] if paying else []
    count = multiprocessing.get_context('forkserver').Value('i', 0)
    finish(start(job, tmp_path/'whole', tmp_path/'log', *url))
    want = content(tmp_path/'whole')
    p = start(jobs.faulty, tmp_path/'counted', -1, 0, count, job, tmp_path/'counted', tmp_path/'log', *url); finish(p)
    n, hows = count.value, (errno.ENOSPC, 0, errno.EACCES)
    assert n > 5
    for k, how in ([(k, how) for k in range(1, n + 1) for how in hows] if LONG
                   else [(k, hows[i % 3]) for i, k in enumerate(range(1, n + 1, max(1, n//6)))]):
        folder = tmp_path/f'{k} {how}'
        p = start(jobs.faulty, folder, k, how, count, job, folder, tmp_path/'log', *url); p.join(120)
        assert p.exitcode in ((-9, 0) if how == 0 else (0,)), f'operation {k}: the process ended with {p.exitcode}'
        finish(start(job, folder, tmp_path/'log', *url)); assert content(folder) == want and not litter(folder), (k, how)
        COUNTS['faults injected'] += 1

# --- stopped, and two at once -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('stage', ['write', 'diffs', 'adapter'])
@pytest.mark.parametrize('sign, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal(stage, sign, code, tmp_path):
    "A run that ended before it was reached is begun again"
    job, log = STAGES[stage][0], tmp_path/'log'
    for k in range(20):
        folder = tmp_path/f'run {k}'; log.unlink(missing_ok=True)
        p = start(jobs.stopped, tmp_path/'said', job, folder, log)
        while p.is_alive() and not (log.exists() and len(log.read_text().splitlines()) > 1): time.sleep(.001)
        with contextlib.suppress(ProcessLookupError): os.kill(p.pid, sign)
        p.join(60)
        if p.exitcode: break
    assert p.exitcode == code and 'run the same again to go on' in (tmp_path/'said').read_text()
    COUNTS['signals obeyed'] += 1
    finish(start(job, folder, log)); finish(start(job, tmp_path/'whole', log))
    assert content(folder) == content(tmp_path/'whole') and not litter(folder)

def test_one_run_in_a_folder(tmp_path):
    "The second is told who is there; what a dead process held is taken over"
    begun = multiprocessing.get_context('forkserver').Event()
    p = start(jobs.held, tmp_path, begun); assert begun.wait(60)
    with pytest.raises(DitError, match=f'in use by process {p.pid} on .* since 20'): jobs.adapter(tmp_path)
    p.kill(); p.join()
    jobs.adapter(tmp_path, epochs=1)
    assert (tmp_path/'dit.json').exists() and not (tmp_path/'.running.json').exists()

# --- the key of an endpoint -----------------------------------------------------------------------------------------------------------

NOTEBOOK = ["from dit.endpoint import Endpoint; e = Endpoint('replies.jsonl', 'm', {url!r})", "e", "vars(e), e.client",
            "e.reply(e.request([dict(role='user', content='hello')]))"]

def test_the_key_is_in_nothing_that_a_run_leaves(server, tiny, tmp_path, capfd, monkeypatch):
    "Writer, judge, guesser and agent against a server that answers, refuses and breaks off; then all that was written or shown"
    errors, ask = [], lambda e: load_texts(EndpointWriter(e, n=3), jobs.rows(2), 'news', tmp_path/'text.jsonl')
    for faults in ([401], [500]*6, ['cut']*6, ['html'], []):
        server.faults = list(faults)
        try: ask(endpoint(paid_server(server), tmp_path/'replies.jsonl'))
        except DitError as e: errors.append(e)
    e = endpoint(server, tmp_path/'replies.jsonl')
    bank, other, agents = jobs.named(tiny, 3, 'fern', 1), server.content, script([call(0, message='hi')], 'ANSWER: moss')
    server.content = lambda request, n: (agents if 'tools' in request else other)(request, n)
    asked = [ask_all(tiny, bank, None, 'news', 'Base Question', max_new=4)]
    for faults in ([401], [500]*5, ['cut']*5, []):
        server.faults = list(faults)
        try: asked.append(ask_agent(e, tiny, bank.take([0]), 'news', 'Agent'))
        except DitError as x: errors.append(x)
    assert [f.answer[0] for f in asked[1:]] == [None, None, 'moss'] and KEY in server.keys[-1]
    server.faults = [400]
    save_results(grade(add_guesses(pd.concat(asked, ignore_index=True), LLMGuesser(e)), LLMJudge(e)), tmp_path/'news.csv', endpoint=e.where)
    monkeypatch.setenv('OPENAI_API_KEY', KEY); server.faults = [401]
    write_nb(new_nb([mk_cell(c.format(url=server.url)) for c in NOTEBOOK]), tmp_path/'a.ipynb')
    CaptureShell(tmp_path).execute(tmp_path/'a.ipynb', tmp_path/'run.ipynb')
    assert 'refused the request' in (tmp_path/'run.ipynb').read_text() and len(errors) == 5 and len(list(tmp_path.iterdir())) >= 6
    no_key(tmp_path, *errors, *capfd.readouterr(), repr(vars(e)))

# --- the same tomorrow ----------------------------------------------------------------------------------------------------------------

def test_the_same_tomorrow(tmp_path):
    "Another process, in which sets and hashes have another order: the same texts, bank, adapter and answers, bit for bit"
    here, code = Path(__file__).parent, 'import sys, jobs; from pathlib import Path; jobs.everything(Path(sys.argv[1]))'
    finish(start(jobs.everything, tmp_path/'today'), 600)
    subprocess.run([sys.executable, '-c', code, tmp_path/'tomorrow'],
                   env=os.environ | dict(PYTHONHASHSEED='1', PYTHONPATH=os.pathsep.join([str(here), str(here.parent)])),
                   check=True, timeout=600)
    today, tomorrow = content(tmp_path/'today'), content(tmp_path/'tomorrow')
    assert (today == tomorrow
            and {'bank/shard-00001.safetensors', 'bank/index.csv', 'adapter/adapter_model.safetensors', 'asked.csv'} <= set(today))
    answers = pd.read_csv(tmp_path/'today'/'asked.csv').answer
    assert answers.nunique() > 1
    COUNTS['rows checked'] += len(read_index(tmp_path/'today'/'bank')) + len(answers)
