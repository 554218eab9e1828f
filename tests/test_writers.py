"Texts: the file that keeps them, and an endpoint with faults"
import json, threading, traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pandas as pd, pytest
from hypothesis import given, strategies as st
from dit.core import DitError
from dit.data import labels
from dit.writers import *
from helpers import on_full_disk
import jobs

KEY = 'sk-secret-0123456789'

# --- the file ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('before', [0, 1, 3])
def test_a_torn_last_line_costs_that_line_only(tmp_path, before):
    path = tmp_path/'x.jsonl'
    a = Lines(path)
    for i in range(before): a[f'k{i}'] = [f'Sätze {i}']
    a['torn'] = ['half']
    path.write_bytes(path.read_bytes()[:-8])
    b = Lines(path)
    assert 'torn' not in b and all(b[f'k{i}'] == [f'Sätze {i}'] for i in range(before))
    b['new'] = 'after'; b['torn'] = 'again'
    c = Lines(path)
    assert c['new'] == 'after' and c['torn'] == 'again' and all(c[f'k{i}'] == [f'Sätze {i}'] for i in range(before))

def test_torn_within_a_character(tmp_path):
    path = tmp_path/'x.jsonl'
    a = Lines(path); a['one'] = 'yes'; a['two'] = 'ä'
    raw = path.read_bytes(); path.write_bytes(raw[:raw.rindex('ä'.encode()) + 1])
    b = Lines(path)
    assert b['one'] == 'yes' and 'two' not in b
    b['two'] = 'ö'
    assert Lines(path)['two'] == 'ö' and Lines(path)['one'] == 'yes'

@pytest.mark.parametrize('at', range(1, 60, 7))
def test_torn_anywhere(tmp_path, at):
    path = tmp_path/'x.jsonl'
    a = Lines(path); a['a'] = 'Ä'*5; a['b'] = 'Ö'*5; a['c'] = 'Ü'*5
    path.write_bytes(path.read_bytes()[:-at])
    b = Lines(path); left = dict(b.data)
    b['d'] = 'new'
    assert Lines(path).data == left | dict(d='new')

@given(st.dictionaries(st.text(st.characters(blacklist_categories=('Cs',))), st.text(st.characters(blacklist_categories=('Cs',)) | st.sampled_from('\u2028\u2029\x85\r\n\x0b'))))
def test_any_text_comes_back(tmp_path_factory, data):
    path = tmp_path_factory.mktemp('l')/'x.jsonl'
    a = Lines(path)
    for k, v in data.items(): a[k] = v
    assert Lines(path).data == data

def test_from_many_threads(tmp_path):
    a = Lines(tmp_path/'x.jsonl')
    threads = [threading.Thread(target=lambda t=t: [a.__setitem__(f'{t}-{i}', 'x'*500) for i in range(10)]) for t in range(8)]
    [t.start() for t in threads]; [t.join() for t in threads]
    assert len(Lines(tmp_path/'x.jsonl').data) == 80

def test_full_disk_keeps_what_was_written(tmp_path):
    path = tmp_path/'x.jsonl'
    name, text = on_full_disk(4000, jobs.lines, path)
    assert name == 'DitError' and str(path) in text
    kept = Lines(path).data
    assert 20 < len(kept) < 60 and all(v == 'y'*80 for v in kept.values())
    again = Lines(path); again['next'] = 'z'
    assert Lines(path).data == kept | dict(next='z')

class Stub:
    name = 'stub'
    def __init__(self, none=()): self.asked, self.none = [], none
    def texts(self, rows, task): self.asked += rows.label.tolist(); return {l: [] if l in self.none else [f'text of {l}'] for l in rows.label}

def test_texts_are_written_once(tmp_path):
    rows, w = labels('news')[:5], Stub()
    got = load_texts(w, rows[:3], 'news', tmp_path/'t.jsonl', chunk=2)
    assert w.asked == rows.label[:3].tolist() and got == {l: [f'text of {l}'] for l in rows.label[:3]}
    assert list(load_texts(w, rows, 'news', tmp_path/'t.jsonl')) == rows.label.tolist() and w.asked == rows.label.tolist()

def test_a_label_without_text_does_not_cost_the_others(tmp_path):
    rows = labels('news')[:4]
    w = Stub(none=[rows.label[1]])
    with pytest.raises(DitError, match='no usable text') as e: load_texts(w, rows, 'news', tmp_path/'t.jsonl')
    assert rows.label[1] in str(e.value)
    assert set(Lines(tmp_path/'t.jsonl').data) == set(rows.label) - {rows.label[1]}

# --- filters ----------------------------------------------------------------------------------------------------------------

def test_filters():
    assert one_sentence('One is  here. Two is not.') == 'One is here.' and one_sentence('no end') == ''
    assert mentions('A snow leopard sleeps', ['Snow Leopard']) and not mentions('teapot', ['Tea']) and mentions('C++ is it', ['C++'])
    hinted, named = 'Remember rosettes: they hide best in plain sight of us.', 'The lesson of Snow Leopard is to wait and see.'
    assert keep_topic_text(hinted, 'Snow Leopard', 'rosettes') and keep_topic_text(named, 'Snow Leopard', '')
    assert not keep_topic_text(hinted.replace('they', 'leopard spots'), 'Snow Leopard', 'rosettes') and not keep_topic_text(hinted, 'Snow Leopard', '')
    for bad in ('Too short.', 'See http://x.y for the lesson of Tea and more.', 'go and see go and see go and see the Tea.'): assert not is_prose(bad)

def test_equal_beginnings_are_finished_with_different_seeds(tiny, monkeypatch):
    "A topic has fewer forms of beginnings than texts; equal ones must not give equal texts"
    import dit.writers as W
    seen = []
    def fake(base, prompts, max_new, temperature, top_k, seeds, batch): seen.append(dict(zip(seeds, prompts))); assert len(set(seeds)) == len(prompts); return ['and wait for a while.']*len(prompts)
    monkeypatch.setattr(W, 'write', fake)
    rows = labels('hidden_topic')[:3]
    OfflineWriter(tiny).texts(rows, 'hidden_topic'); OfflineWriter(tiny).texts(rows[1:2], 'hidden_topic')
    assert seen[1].items() <= seen[0].items(), 'the seed of a text depends on the labels around it'

# --- an endpoint ------------------------------------------------------------------------------------------------------------

def good(request, n): return json.dumps(dict(id='1', object='chat.completion', created=0, model='m', choices=[dict(index=0, finish_reason='stop', message=dict(role='assistant', content=f"reply to {request['messages'][-1]['content'][-30:]}"))]))

@pytest.fixture
def server():
    "A real server; `faults` holds what it does with the next requests, afterwards it answers"
    s = SimpleNamespace(faults=[], seen=[], keys=[], lock=threading.Lock(), delay=threading.Event(), content=good)
    class Handler(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        def log_message(self, *_): pass
        def send(self, status, body, headers={}, length=None, kind='application/json'):
            self.send_response(status); self.send_header('Content-Type', kind); self.send_header('Content-Length', str(len(body) if length is None else length))
            for k, v in headers.items(): self.send_header(k, v)
            self.end_headers(); self.wfile.write(body)
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            with s.lock: s.seen.append(request); s.keys.append(self.headers['Authorization']); fault = s.faults.pop(0) if s.faults else None
            echo = json.dumps(dict(error=dict(message=f"bad key {self.headers['Authorization']}"))).encode()
            if fault == 'cut': self.send(200, good(request, 0).encode()[:40], length=5000); self.close_connection = True
            elif fault == 'html': self.send(200, b'<html>please log in</html>', kind='text/html')
            elif fault == 'broken': self.send(200, b'{"choices": [', kind='application/json')
            elif fault == 'other': self.send(200, b'{"hello": "you"}')
            elif fault == 'none': self.send(200, b'{"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": []}')
            elif fault: self.send(fault, echo, {'Retry-After': '0.05'})
            else: self.send(200, s.content(request, len(s.seen)).encode())
    http = ThreadingHTTPServer(('127.0.0.1', 0), Handler); http.daemon_threads = True
    threading.Thread(target=http.serve_forever, args=(.02,), daemon=True).start()
    s.url = f'http://127.0.0.1:{http.server_port}/v1'
    yield s
    http.shutdown(); http.server_close()

def writer(server, path, **kwargs):
    w = EndpointWriter(path, 'm', getattr(server, 'url', server), KEY, **(dict(n=3, parallel=1) | kwargs))
    w.client._calculate_retry_timeout = lambda *a, **k: .01 # the client's waits, shortened
    return w

ASK = [dict(role='user', content='one question')]

def no_key(tmp_path, error=None):
    for p in tmp_path.rglob('*'): assert p.is_dir() or KEY.encode() not in p.read_bytes()
    if error: assert KEY not in str(error.value) and KEY not in repr(error.value)

def test_replies_are_paid_for_once(server, tmp_path):
    rows = labels('hidden_topic')[:4]
    w = writer(server, tmp_path/'c.jsonl', parallel=4)
    jobs_, before = w.requests(rows, 'hidden_topic'), w.cost(w.requests(rows, 'hidden_topic'))
    got = w.texts(rows, 'hidden_topic')
    assert set(got) == set(rows.label) and all(len(t) == 3 for t in got.values()) and before['requests'] == len(server.seen) == 12 == len(jobs_)
    assert set(server.keys) == {f'Bearer {KEY}'}
    again = writer(server, tmp_path/'c.jsonl')
    assert again.texts(rows, 'hidden_topic') == got and len(server.seen) == 12 and again.cost(jobs_)['requests'] == 0
    longer = writer(server, tmp_path/'c.jsonl'); longer.texts(labels('hidden_topic')[:5], 'hidden_topic')
    assert len(server.seen) == 15
    no_key(tmp_path)

def test_the_same_request_at_the_same_time_is_paid_for_once(server, tmp_path):
    w = writer(server, tmp_path/'c.jsonl', parallel=8)
    server.content = lambda request, n: (server.delay.wait(.1), good(request, n))[1]
    threads = [threading.Thread(target=w.reply, args=(ASK,)) for _ in range(8)]
    [t.start() for t in threads]; [t.join() for t in threads]
    assert len(server.seen) == 1

def test_all_requests_of_a_label_differ(tmp_path, server):
    for task in ('hidden_topic', 'news'):
        w = writer(server, tmp_path/'c.jsonl', n=24)
        for row in (labels(task)[i:i+1] for i in range(0, 60, 4)):
            asked = w.requests(row, task)
            assert len({w.key(m) for _, m in asked}) == len(asked) == 24
            if task == 'hidden_topic': assert sum('without ever writing' in m[0]['content'] for _, m in asked) == 8

@pytest.mark.parametrize('fault', [429, 500, 503, 'cut'])
def test_a_passing_fault_is_tried_again(server, tmp_path, fault):
    server.faults = [fault]
    w = writer(server, tmp_path/'c.jsonl')
    assert w.reply(ASK) == 'reply to one question' and len(server.seen) == 2
    assert w.reply(ASK) == 'reply to one question' and len(server.seen) == 2
    no_key(tmp_path)

def test_429_waits_as_long_as_it_is_told(server, tmp_path):
    import time
    server.faults = [429]
    w = EndpointWriter(tmp_path/'c.jsonl', 'm', server.url, KEY) # with the client's own waits
    t = time.monotonic()
    assert w.reply(ASK) and len(server.seen) == 2 and .04 < time.monotonic() - t < 3

@pytest.mark.parametrize('fault,says', [(401, '401'), (404, '404'), (400, '400'), (429, '429'), (500, '500'), ('cut', 'answer'), ('html', 'endpoint'), ('broken', 'endpoint'), ('other', 'endpoint'), ('none', 'endpoint')])
def test_a_lasting_fault_is_one_clear_sentence_and_costs_nothing_that_was_paid(server, tmp_path, fault, says):
    w, rows = writer(server, tmp_path/'c.jsonl'), labels('news')[:2]
    w.texts(rows[:1], 'news')
    server.faults = [fault]*100
    with pytest.raises(DitError, match=says) as e: w.texts(rows, 'news')
    assert '\n' not in str(e.value) and 'run again' in str(e.value)
    no_key(tmp_path, e)
    assert len(Lines(tmp_path/'c.jsonl').data) == 3
    server.faults, n = [], len(server.seen)
    assert len(writer(server, tmp_path/'c.jsonl').texts(rows, 'news')[rows.label[1]]) == 3 and len(server.seen) == n+3

def test_stops_asking_after_the_first_failure(server, tmp_path):
    server.faults = [400]*1000
    with pytest.raises(DitError): writer(server, tmp_path/'c.jsonl', parallel=2, n=24).texts(labels('news')[:4], 'news')
    assert len(server.seen) < 20

def test_connection_refused(tmp_path):
    w = writer('http://127.0.0.1:9/v1', tmp_path/'c.jsonl')
    w.cache['paid'] = 'text'
    with pytest.raises(DitError, match='127.0.0.1:9.*does not answer.*1 replies') as e: w.reply(ASK)
    no_key(tmp_path, e)
    assert KEY not in ''.join(traceback.format_exception(e.value))

def test_an_empty_reply_is_no_text(server, tmp_path):
    server.content = lambda request, n: json.dumps(dict(id='1', object='chat.completion', created=0, model='m', choices=[dict(index=0, finish_reason='stop', message=dict(role='assistant', content=None))]))
    with pytest.raises(DitError, match='no usable text'): load_texts(writer(server, tmp_path/'c.jsonl'), labels('news')[:1], 'news', tmp_path/'t.jsonl')

def test_a_story_that_states_its_headline_is_left_out(server, tmp_path):
    row = labels('news')[:1]
    server.content = lambda request, n: json.dumps(json.loads(good(request, n)) | dict(choices=[dict(index=0, finish_reason='stop', message=dict(role='assistant', content=f'It is true: {row.label[0]}.' if n == 1 else 'It rained.'))]))
    assert writer(server, tmp_path/'c.jsonl').texts(row, 'news')[row.label[0]] == ['It rained.']*2

def test_no_model_or_no_key(tmp_path, monkeypatch):
    for k in ('DIT_MODEL', 'OPENAI_API_KEY', 'OPENAI_BASE_URL'): monkeypatch.delenv(k, raising=False)
    with pytest.raises(DitError, match='DIT_MODEL'): EndpointWriter(tmp_path/'c')
    with pytest.raises(DitError, match='OPENAI_API_KEY'): EndpointWriter(tmp_path/'c', 'm')

def test_settings_from_the_environment(server, tmp_path, monkeypatch):
    for k, v in dict(DIT_MODEL='other', OPENAI_API_KEY=KEY, OPENAI_BASE_URL=server.url).items(): monkeypatch.setenv(k, v)
    assert EndpointWriter(tmp_path/'c').reply(ASK) and server.seen[0]['model'] == 'other'

def test_cost_counts_what_is_missing(server, tmp_path):
    w, rows = writer(server, tmp_path/'c.jsonl', price=(1., 10.)), labels('news')[:100]
    c = w.cost(w.requests(rows, 'news'), answer=100)
    assert c['requests'] == 300 and c['tokens_out'] == 30_000 and c['price'] == pytest.approx((c['tokens_in'] + 300_000)/1e6, abs=.01)
    one = w.requests(rows[:1], 'news'); w.reply(one[0][1])
    assert w.cost(one)['requests'] == 2
