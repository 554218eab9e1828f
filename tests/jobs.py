"Functions that tests run in processes of their own"
import builtins, io, os, resource, signal, sys, time

import pandas as pd, torch
from dit import diffs as D, lora as L, tune as T
from dit.core import DitError, hold, write_json
from dit.data import hidden_topic_task, questions
from dit.diffs import train_diffs
from dit.endpoint import Endpoint, Lines
from dit.eval import add_guesses, ask_all, grade, save_results
from dit.llm import LLMGuesser, LLMJudge
from dit.lora import load_bank, random_bank, read_index, save_shard
from dit.tune import train_adapter
from dit.writers import EndpointWriter, load_texts
from helpers import model_of, toy_tasks

def diffs(folder, n=10, steps=12, batch=2):
    torch.set_num_threads(1)
    train_diffs(model_of('llama'), toy_tasks(n, steps), folder, rank=2, batch=batch)

def named(base, n, name, seed):
    bank = random_bank(base, n, seed=seed)
    bank.index['label'] = [f'{name} {i}' for i in range(n)]
    return bank

def adapter(folder, epochs=5, **kwargs):
    torch.set_num_threads(1)
    base = model_of('llama')
    train_adapter(base, {'What?': named(base, 12, 'fern', 1)}, {'What?': named(base, 4, 'moss', 2)}, folder, rank=2,
                  batch=4, epochs=epochs, **kwargs)

def shard(folder): save_shard(folder, random_bank(model_of('llama'), 4, seed=3))

def read_rows(folder, out):
    "Read a bank four rows at a time; how much the process's memory grew"
    torch.set_num_threads(1)
    bank, peak = (load_bank(folder, model_of('llama', hidden_size=64, intermediate_size=128)),
                  lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024)
    bank.rows([0, 1, 2, 3]); before = peak()
    for i in range(0, len(bank), 4): bank.rows(range(i, i + 4))
    write_json(out, peak() - before)

def big_json(path): write_json(path, ['x'*100]*1000)

def lines(path):
    a = Lines(path)
    for i in range(1000): a[f'k{i}'] = 'y'*80

# --- the four stages, each of them in a folder, as a process that may be killed; what is begun is written to a log --------------------

def note(log, text):
    with open(log, 'a') as f: f.write(f'{text}\n')

class Scribe:
    "A writer that is quick, and says what it writes"
    def __init__(self, log): self.log = log
    def texts(self, rows, task): return {l: (note(self.log, l), time.sleep(.02), [f'{l} one.', f'{l} two.'])[2] for l in rows.label}

def rows(n): return pd.DataFrame(dict(label=[f'label {i}' for i in range(n)], associations='a; b'))

def stage_write(folder, log, n=12):
    load_texts(Scribe(log), rows(n), 'news', folder/'text.jsonl', chunk=2)

def stage_pay(folder, log, url, n=6):
    writer = EndpointWriter(Endpoint(folder/'replies.jsonl', 'm', url, 'none', parallel=2), n=4)
    load_texts(writer, rows(n), 'news', folder/'text.jsonl', chunk=2)

def stage_diffs(folder, log, n=6):
    torch.set_num_threads(1)
    plain = D.train_batch
    def logged(base, tasks, *a, **k):
        there = set(read_index(folder/'bank').diff_id)
        for t in tasks: note(log, f"{'AGAIN ' if t.diff_id in there else ''}{t.diff_id}")
        return plain(base, tasks, *a, **k)
    D.train_batch = logged
    train_diffs(model_of('llama'), toy_tasks(n, 3), folder/'bank', rank=2, batch=2)

def stage_adapter(folder, log, epochs=5):
    torch.set_num_threads(1)
    plain = T.train_epoch
    T.train_epoch = lambda *a: (note(log, 'epoch'), plain(*a))[1]
    adapter(folder, epochs)

def stage_eval(folder, log, url):
    torch.set_num_threads(1)
    base = model_of('llama'); bank = named(base, 3, 'fern', 1)
    asked = pd.concat([ask_all(base, bank, named(base, 1, 'x', 2), 'news', m, max_new=4, kept=Lines(folder/'answers.jsonl'))
                       for m in ('DIT', 'Base Question')], ignore_index=True)
    e = Endpoint(folder/'replies.jsonl', 'm', url, 'none', parallel=2)
    save_results(grade(add_guesses(asked, LLMGuesser(e)), LLMJudge(e)), folder/'news.csv')

SAID = {q: 'Well, it depends.' for k in ('everyday', 'introspective') for q in questions(k, 'train')}

def everything(folder):
    "From texts to answers: bank, adapter, table"
    torch.set_num_threads(1)
    base, texts = model_of('llama'), load_texts(Scribe(folder/'log'), rows(6), 'hidden_topic', folder/'text.jsonl')
    bank = train_diffs(base, [hidden_topic_task(l, 'train', t, SAID, steps=2) for l, t in texts.items()], folder/'bank', rank=2, batch=4)
    adapter = train_adapter(base, {'What?': bank.take([0, 1, 2, 3])}, {'What?': bank.take([4, 5])}, folder/'adapter',
                            rank=2, batch=2, epochs=2)
    save_results(pd.concat([ask_all(base, bank, adapter, 'hidden_topic', m, max_new=4) for m in ('DIT', '20 Questions + Trigger')],
                           ignore_index=True), folder/'asked.csv')

def stopped(said, job, *args):
    "A job that is stopped as a user would stop it; what it says goes to a file"
    signal.signal(signal.SIGINT, signal.default_int_handler) # where the tests run in the background, it is ignored
    sys.stderr = open(said, 'w')
    try: job(*args)
    except KeyboardInterrupt: raise SystemExit(130)

def held(folder, begun):
    with hold(folder): begun.set(); time.sleep(600)

def sharing(folder, log, everyone, n=12, dies=False):
    "Train as one of several; nobody goes on before all have begun (told by the log: a lock would be lost with who is killed)"
    torch.set_num_threads(1)
    plain = D.train_batch
    def logged(base, tasks, *a, **k):
        for t in tasks: note(log, f'{os.getpid()} {t.diff_id}')
        while len({l.split()[0] for l in log.read_text().splitlines()}) < everyone: time.sleep(.01)
        if dies: time.sleep(600)
        return plain(base, tasks, *a, **k)
    D.train_batch = logged
    train_diffs(model_of('llama'), toy_tasks(n, 3), folder, rank=2, batch=2)

# --- a fault at the k-th operation on a file of the folder --------------------------------------------------------------------------

def faulty(folder, k, how, count, job, *args):
    "Run a job in which the k-th operation on files of a folder fails: `how` is an errno, or 0 for being killed there"
    at = [0]
    def step(path):
        if not str(path).startswith(str(folder)): return
        at[0] += 1
        if at[0] == k and how == 0: os.kill(os.getpid(), 9)
        if at[0] == k: raise OSError(how, os.strerror(how), str(path))
    class Raw(io.FileIO):
        def write(self, data):
            if self.name is not None: step(self.name)
            return super().write(data)
    plain = io.open
    def opened(file, mode='r', buffering=-1, encoding=None, errors=None, newline=None, *a, **k):
        if not isinstance(file, (str, os.PathLike)) or not set(mode) & set('wa+') or not str(file).startswith(str(folder)):
            return plain(file, mode, buffering, encoding, errors, newline, *a, **k)
        step(file); raw = Raw(file, mode.replace('b', '').replace('t', ''))
        f = io.BufferedRandom(raw) if '+' in mode else io.BufferedWriter(raw)
        return f if 'b' in mode else io.TextIOWrapper(f, encoding or 'utf-8', errors, newline)
    io.open = builtins.open = opened
    def wrap(module, name, of=lambda *a, **k: a[0]):
        normal = getattr(module, name)
        def call(*a, **k): step(of(*a, **k)); return normal(*a, **k)
        setattr(module, name, call)
    for name in ('replace', 'mkdir', 'unlink', 'open'): wrap(os, name)
    wrap(os, 'fsync', lambda fd: os.readlink(f'/proc/self/fd/{fd if isinstance(fd, int) else fd.fileno()}'))
    wrap(L, 'save_file', lambda tensors, path: path)
    try: job(*args)
    except DitError as e:
        if how == 0 or '\n' in str(e): raise
    finally: count.value = at[0]
