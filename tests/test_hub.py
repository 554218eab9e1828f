"Uploads to a hub on the loopback address, and what the model card says"
import base64, contextlib, hashlib, json, os, shutil, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pandas as pd, pytest
from huggingface_hub import HfApi, ModelCard
from dit.core import DitError
from dit.diffs import train_diffs
from dit.eval import save_results
from dit.hub import *
from dit.lora import *
from dit.models import load_base
from dit.own import score_own, train_own
from dit.stats import summarise
from dit.tune import train_adapter
from helpers import char_tokenizer, model_of, toy_tasks
from jobs import named

ROOT = Path(__file__).resolve().parents[1]
SHA = 'a'*40

@contextlib.contextmanager
def hub():
    "As much of the hub as an upload and a download use: repositories of small files, kept in memory"
    s = SimpleNamespace(repos={}, private={}, asked=[], refuse=None)
    class Handler(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        def log_message(self, *_): pass
        def send(self, body=b'', status=200, **headers):
            body = json.dumps(body).encode() if not isinstance(body, bytes) else body
            self.send_response(status)
            for k, v in dict(content_length=len(body), x_repo_commit=SHA, **headers).items(): self.send_header(k.replace('_', '-'), str(v))
            self.end_headers()
            if self.command != 'HEAD': self.wfile.write(body)
        def do_POST(self):
            body = self.rfile.read(int(self.headers['Content-Length'])); path = self.path.split('?')[0]; s.asked.append(path)
            if s.refuse: return self.send(dict(error='not yours'), s.refuse)
            if path == '/api/repos/create':
                q = json.loads(body)
                name = f"{q['organization']}/{q['name']}"
                s.repos.setdefault(name, {})
                s.private[name] = q.get('visibility') == 'private' or q.get('private', False)
                return self.send(dict(url=f'{s.url}/{name}'))
            if path == '/api/validate-yaml': return self.send(dict(errors=[], warnings=[]))
            name = '/'.join(path.split('/')[3:5])
            if '/preupload/' in path:
                return self.send(dict(files=[dict(path=f['path'], uploadMode='regular', shouldIgnore=False)
                                             for f in json.loads(body)['files']]))
            for line in map(json.loads, body.splitlines()):
                if line['key'] == 'file': s.repos[name][line['value']['path']] = base64.b64decode(line['value']['content'])
            self.send(dict(commitUrl=f'{s.url}/{name}/commit/{SHA}', commitOid=SHA))
        def do_GET(self):
            path = self.path.split('?')[0]; s.asked.append(path); parts = path.strip('/').split('/')
            name = '/'.join(parts[1+(parts[0] == 'api'):3+(parts[0] == 'api')] if parts[0] == 'api' else parts[:2])
            if name not in s.repos: return self.send(dict(error='Repository not found'), 404, x_error_code='RepoNotFound')
            files = s.repos[name]
            entry = lambda f: dict(type='file', path=f, size=len(files[f]), oid=hashlib.sha1(files[f]).hexdigest())
            if parts[0] == 'api':
                return self.send([entry(f) for f in files] if 'tree' in parts
                                 else dict(id=name, sha=SHA, siblings=[dict(rfilename=f) for f in files]))
            data = files['/'.join(parts[4:])]
            self.send(data, etag=f'"{hashlib.sha1(data).hexdigest()}"')
        do_HEAD = do_GET
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as http:
        http.daemon_threads, http.block_on_close = True, False
        threading.Thread(target=http.serve_forever, args=(.02,), daemon=True).start()
        s.url = f'http://127.0.0.1:{http.server_port}'
        try: yield s
        finally: http.shutdown()

@pytest.fixture
def server():
    with hub() as s: yield s

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A base model, a bank with four diffs, an adapter, and results"
    home = tmp_path_factory.mktemp('hub')
    model_of('llama').model.save_pretrained(home/'base'); char_tokenizer().save_pretrained(home/'base')
    base = load_base(str(home/'base'), dtype='float32')
    train_diffs(base, toy_tasks(4), home/'bank', rank=2, batch=2, recipe=dict(steps=4))
    train_adapter(base, {'What?': named(base, 5, 'fern', 1)}, {'What?': named(base, 3, 'moss', 2)}, home/'adapter',
                  rank=2, lr=1e-2, epochs=3)
    (home/'adapter'/'notes.txt').write_text('not for others')
    evaluated(home/'results'/'news.csv', json.loads((home/'adapter'/'dit.json').read_text()))
    return home

def evaluated(path, trainer,
              scores=dict(DIT=[4.2, 3, 5], **{'DIT + Trigger': [5, 4.5, 5], 'DIT trained on the other task': [1, 1.5, 2],
                                              'Base Question': [1, 2.25, None]})):
    "A table of results as an evaluation writes it"
    frame = pd.concat([pd.DataFrame(dict(diff_id=['a', 'b', 'c'], method=m, score=s)) for m, s in scores.items()])
    save_results(frame, path, task='news', model='base', adapter=trainer, n_diffs=3, seed=0, decoding='short',
                 judge='offline', guesser='offline', recipe=dict(rank=7, steps=4))
    return frame

def run(module, *args, server=None):
    "A command in a process of its own, with the loopback address as its hub"
    env = os.environ | dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE='0', HF_ENDPOINT=server.url if server else 'http://127.0.0.1:9',
                            HF_TOKEN='hf_test', HF_HUB_DISABLE_XET='1', no_proxy='127.0.0.1', NO_PROXY='127.0.0.1', OMP_NUM_THREADS='1')
    return subprocess.run([sys.executable, '-m', module, *map(str, args)], capture_output=True, text=True,
                          env=env | ({'HF_HOME': str(server.home)} if server else {}), timeout=300)

def test_pushed_and_read_back_by_id(home, server, tmp_path):
    "Two commands push a bank and an adapter, a third asks one of the other by their ids"
    server.home = tmp_path
    done = [run('dit.hub', home/'bank', 'me/bank', '--private', server=server),
            run('dit.hub', home/'adapter', 'me/adapter', '--results', home/'results'/'news.csv', server=server)]
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    assert (set(server.repos['me/bank']) == {'README.md', 'bank.json', 'index.csv', 'shard-00000.safetensors', 'shard-00001.safetensors'}
            and server.private == {'me/bank': True, 'me/adapter': False})
    assert set(server.repos['me/adapter']) == {'README.md', 'adapter_config.json', 'adapter_model.safetensors',
                                               'dit.json', 'curve.csv'}, 'checkpoints and notes stay at home'
    for name in ('bank', 'adapter'):
        for file, data in server.repos[f'me/{name}'].items(): assert (home/name/file).read_bytes() == data
    asked = run('dit.ask', 'What?', '--base', home/'base', '--json', '--diff', 'me/bank#2', '--adapter', 'me/adapter', server=server)
    assert asked.returncode == 0, asked.stderr
    found, fetched = json.loads(asked.stdout), [p for p in tmp_path.rglob('snapshots/*/*')]
    assert (found['diff']['kind'], found['diff']['label'], found['adapter']['questions']) == ('row of a bank', 'label 2', ['What?'])
    assert {p.name for p in fetched} >= {'index.csv', 'shard-00000.safetensors', 'adapter_model.safetensors'}
    for p in fetched: assert p.read_bytes() in (server.repos['me/bank'].get(p.name), server.repos['me/adapter'].get(p.name))

def test_dry_run_needs_no_network(home, server):
    said = push(home/'adapter', 'me/adapter', home/'results'/'news.csv', dry_run=True, api=HfApi(endpoint=server.url))
    assert (not server.asked and said['url'] is None
            and said['files'] == ['README.md', 'adapter_config.json', 'adapter_model.safetensors', 'dit.json', 'curve.csv'])
    assert (home/'adapter'/'README.md').read_text() == card(home/'adapter', 'me/adapter', home/'results'/'news.csv').content

def table(text, head):
    "Rows of the Markdown table whose header begins with `head`"
    lines = text[text.index(f'| {head} |'):].split('\n\n')[0].splitlines()
    return [[c.strip() for c in l.strip('|').split('|')] for l in lines[2:]]

def test_numbers_of_the_card_are_those_of_the_files(home):
    made, frame = card(home/'adapter', 'me/adapter', home/'results'/'news.csv'), pd.read_csv(home/'results'/'news.csv')
    want = summarise(frame)
    assert table(made.text, 'method') == [[m, str(int(r.n)), str(int(r.missing)), f"{r['mean']:.2f}", f'{r.ci95:.2f}']
                                          for m, r in want.iterrows()]
    assert want.loc['Base Question', ['n', 'missing', 'mean']].tolist() == [2, 1, 1.625]
    shown = {r.metric_name.split(',')[0]: r.metric_value for r in ModelCard(made.content).data.eval_results}
    assert shown == {m: pytest.approx(want.loc[m, 'mean'], abs=1e-4) for m in ('DIT', 'DIT + Trigger')}, (
        'the scores of the adapter itself and no others')
    facts, curve = json.loads((home/'adapter'/'dit.json').read_text()), pd.read_csv(home/'adapter'/'curve.csv').set_index('epoch')
    rows = dict(table(made.text, ''))
    for k in ('n_train', 'rank', 'lr', 'batch', 'epochs', 'best_epoch', 'seed'): assert rows[k] == str(facts[k])
    assert float(rows['val_loss of that epoch']) == curve.val_loss[facts['best_epoch']] and rows['base model'] == 'base'
    origin = dict(table(made.text, 'the adapter'))
    assert origin['date'] == facts['provenance']['date'] and origin['torch'] == facts['provenance']['versions']['torch']
    assert 'does not score higher than: DIT + Trigger' in made.text and '- What?' in made.text and 'rank 7, steps 4' in made.text

def test_numbers_of_the_packaged_adapters_cards():
    for task in ('hidden_topic', 'news'):
        path = ROOT/'results'/'eval'/'SmolLM2-135M-Instruct'/f'{task}.csv'
        made = card(ROOT/'dit'/'adapters'/f"smollm2-135m-{task.replace('_', '-')}", 'me/x', path)
        want = summarise(pd.read_csv(path))
        assert ([r[3] for r in table(made.text, 'method')] == [f'{m:.2f}' for m in want['mean']]
                and made.data.eval_results[0].metric_value == pytest.approx(want.loc['DIT', 'mean'], abs=1e-4))

def test_card_of_an_adapter_for_ones_own_behaviours(tmp_path):
    "What `dit_own` leaves goes on a card as it is; and a base model from a folder is named in the command"
    base = model_of('llama')
    train_own({f'{a} {b}': [(f'how is {b}?', f'{a} as ever'), (f'and {b}?', f'still {a}')]
               for a in ('red', 'blue') for b in ('moss', 'fern', 'oak')},
              'What?', base, tmp_path, n_val=1, n_test=2, rank=2, steps=2, epochs=1).pipe(score_own, tmp_path)
    text = card(tmp_path/'adapter', 'me/x', tmp_path/'results.csv').text
    assert ([r[0] for r in table(text, 'method')] == ['DIT', 'Base Question', 'adapter alone']
            and 'on 2 held-out diffs of the task own' in text and '--base FOLDER_OF_' in text)
    (tmp_path/'adapter'/'README.md').write_text('my own notes')
    with pytest.raises(DitError, match='not a card of `dit_push`'): push(tmp_path/'adapter', 'me/x', dry_run=True)
    assert (tmp_path/'adapter'/'README.md').read_text() == 'my own notes'

def test_the_command_goes_dry(home, server):
    server.home = home
    done = run('dit.hub', home/'bank', 'me/bank', '--dry_run', server=server)
    assert done.returncode == 0 and 'would upload to me/bank:' in done.stdout and not server.asked, done.stderr

def test_card_of_a_bank(home):
    rows, facts = dict(table(card(home/'bank', 'me/bank').text, '')), json.loads((home/'bank'/'bank.json').read_text())
    assert ((rows['diffs'], rows['diffs, split train'], rows['recipe: steps'], rows['rank']) == ('4', '4', '4', '2')
            and rows['fingerprint of the base model'] == facts['fingerprint'])
    assert float(rows['mean loss at the end']) == read_index(home/'bank').loss.mean()

def test_nothing_is_made_up_without_results(home):
    made = card(home/'adapter', 'me/adapter')
    assert 'None were given' in made.text and made.data.eval_results is None and 'mean' not in made.text

def test_results_of_another_adapter_are_refused(home, tmp_path):
    facts = json.loads((home/'adapter'/'dit.json').read_text())
    evaluated(tmp_path/'news.csv', facts | dict(best_epoch=99))
    with pytest.raises(DitError, match='results of another adapter'): push(home/'adapter', 'me/adapter', tmp_path/'news.csv', dry_run=True)
    with pytest.raises(DitError, match='belong to an adapter'): card(home/'bank', 'me/bank', tmp_path/'news.csv')
    with pytest.raises(DitError, match='cannot be read as results'): card(home/'adapter', 'me/adapter', tmp_path/'nothing.csv')

def test_what_is_not_whole_is_not_pushed(home, tmp_path):
    shutil.copytree(home/'bank', tmp_path/'bank'); shutil.copytree(home/'adapter', tmp_path/'adapter')
    (tmp_path/'bank'/'shard-00001.safetensors').unlink(); (tmp_path/'adapter'/'adapter_model.safetensors').unlink()
    for name, file in (('bank', 'shard-00001'), ('adapter', 'adapter_model')):
        with pytest.raises(DitError, match=f'not whole: {file}'): push(tmp_path/name, 'me/x')
    with pytest.raises(DitError, match='neither a DIT adapter'): push(tmp_path, 'me/x')

def test_a_hub_that_refuses_or_is_not_there(home, server):
    server.refuse, server.home = 403, home
    done = run('dit.hub', home/'bank', 'me/bank', server=server)
    assert (done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith('dit_push: me/bank could not be uploaded:')
            and '403' in done.stderr), done.stderr
    assert 'hf_test' not in done.stdout + done.stderr and not server.repos
    with pytest.raises(DitError, match='me/bank could not be uploaded'):
        push(home/'bank', 'me/bank', api=HfApi(endpoint='http://127.0.0.1:9', token='hf_test'))
