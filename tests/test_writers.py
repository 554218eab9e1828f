"Texts: the file that keeps them, and an endpoint with faults"
import json, threading

import pandas as pd, pytest
from hypothesis import given, strategies as st
from dit.core import DitError
from dit.data import labels
from dit.endpoint import *
from dit.writers import *
from helpers import KEY, completion, endpoint, no_key, on_full_disk
import jobs

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

@given(st.dictionaries(st.text(st.characters(blacklist_categories=('Cs',))),
                       st.text(st.characters(blacklist_categories=('Cs',)) | st.sampled_from('\u2028\u2029\x85\r\n\x0b'))))
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
    def texts(self, rows, task):
        self.asked += rows.label.tolist(); return {l: [] if l in self.none else [f'text of {l}'] for l in rows.label}

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
    assert (not keep_topic_text(hinted.replace('they', 'leopard spots'), 'Snow Leopard', 'rosettes')
            and not keep_topic_text(hinted, 'Snow Leopard', ''))
    for bad in ('Too short.', 'See http://x.y for the lesson of Tea and more.', 'go and see go and see go and see the Tea.'):
        assert not is_prose(bad)

def test_equal_beginnings_are_finished_with_different_seeds(tiny, monkeypatch):
    "A topic has fewer forms of beginnings than texts; equal ones must not give equal texts"
    import dit.writers as W
    seen = []
    def fake(base, prompts, max_new, temperature, top_k, seeds, batch):
        seen.append(dict(zip(seeds, prompts)))
        assert len(set(seeds)) == len(prompts)
        return ['and wait for a while.']*len(prompts)
    monkeypatch.setattr(W, 'write', fake)
    rows = labels('hidden_topic')[:3]
    OfflineWriter(tiny).texts(rows, 'hidden_topic'); OfflineWriter(tiny).texts(rows[1:2], 'hidden_topic')
    assert seen[1].items() <= seen[0].items(), 'the seed of a text depends on the labels around it'

# --- an endpoint ------------------------------------------------------------------------------------------------------------

def writer(server, path, n=3, **kwargs): return EndpointWriter(endpoint(server, path, **kwargs), n)

ASK = [dict(role='user', content='one question')]

def reply(w): return said(w.endpoint.reply(w.endpoint.request(ASK)))
def cost(w, rows, **kwargs): return w.endpoint.cost([r for _, r in w.requests(rows, 'news')], **kwargs)

def test_replies_are_paid_for_once(server, tmp_path):
    rows = labels('hidden_topic')[:4]
    w = writer(server, tmp_path/'c.jsonl', parallel=4)
    asked = [r for _, r in w.requests(rows, 'hidden_topic')]; before = w.endpoint.cost(asked)
    got = w.texts(rows, 'hidden_topic')
    assert (set(got) == set(rows.label) and all(len(t) == 3 for t in got.values())
            and before['requests'] == len(server.seen) == 12 == len(asked))
    assert set(server.keys) == {f'Bearer {KEY}'}
    again = writer(server, tmp_path/'c.jsonl')
    assert again.texts(rows, 'hidden_topic') == got and len(server.seen) == 12 and again.endpoint.cost(asked)['requests'] == 0
    longer = writer(server, tmp_path/'c.jsonl'); longer.texts(labels('hidden_topic')[:5], 'hidden_topic')
    assert len(server.seen) == 15
    no_key(tmp_path)

def test_the_same_request_at_the_same_time_is_paid_for_once(server, tmp_path):
    w = writer(server, tmp_path/'c.jsonl', parallel=8)
    server.content = lambda request, n: (server.delay.wait(.1), completion(request))[1]
    threads = [threading.Thread(target=reply, args=(w,)) for _ in range(8)]
    [t.start() for t in threads]; [t.join() for t in threads]
    assert len(server.seen) == 1

def test_all_requests_of_a_label_differ(tmp_path, server):
    for task in ('hidden_topic', 'news'):
        w = writer(server, tmp_path/'c.jsonl', n=24)
        for row in (labels(task)[i:i+1] for i in range(0, 60, 4)):
            asked = w.requests(row, task)
            assert len({w.endpoint.key(r) for _, r in asked}) == len(asked) == 24
            if task == 'hidden_topic': assert sum('without ever writing' in r['messages'][0]['content'] for _, r in asked) == 8

@pytest.mark.parametrize('fault', [429, 500, 503, 'cut'])
def test_a_passing_fault_is_tried_again(server, tmp_path, fault):
    server.faults = [fault]
    w = writer(server, tmp_path/'c.jsonl')
    assert reply(w) == 'reply to one question' and len(server.seen) == 2
    assert reply(w) == 'reply to one question' and len(server.seen) == 2
    no_key(tmp_path)

def test_429_waits_as_long_as_it_is_told(server, tmp_path):
    import time
    server.faults, server.retry_after = [429], '1.5'
    w = EndpointWriter(Endpoint(tmp_path/'c.jsonl', 'm', server.url, KEY)) # with the client's own waits, which would be half a second
    t = time.monotonic()
    assert reply(w) and len(server.seen) == 2 and time.monotonic() - t > 1.4

@pytest.mark.parametrize('fault,says', [(401, '401'), (404, '404'), (400, '400'), (429, '429'), (500, '500'), ('cut', 'answer'),
                                        ('html', 'endpoint'), ('broken', 'endpoint'), ('other', 'endpoint'), ('none', 'endpoint')])
def test_a_lasting_fault_is_one_clear_sentence_and_costs_nothing_that_was_paid(server, tmp_path, fault, says):
    w, rows = writer(server, tmp_path/'c.jsonl'), labels('news')[:2]
    w.texts(rows[:1], 'news')
    server.faults = [fault]*100
    with pytest.raises(DitError, match=says) as e: w.texts(rows, 'news')
    assert '\n' not in str(e.value) and 'run again' in str(e.value)
    no_key(tmp_path, e.value)
    assert len(Lines(tmp_path/'c.jsonl').data) == 3
    server.faults, n = [], len(server.seen)
    assert len(writer(server, tmp_path/'c.jsonl').texts(rows, 'news')[rows.label[1]]) == 3 and len(server.seen) == n+3

def test_stops_asking_after_the_first_failure(server, tmp_path):
    server.faults = [400]*1000
    with pytest.raises(DitError): writer(server, tmp_path/'c.jsonl', parallel=2, n=24).texts(labels('news')[:4], 'news')
    assert len(server.seen) < 20

def test_connection_refused(tmp_path):
    w = writer('http://127.0.0.1:9/v1', tmp_path/'c.jsonl')
    w.endpoint.cache['paid'] = dict(message='text', usable=True, requests=1, paid=0.)
    with pytest.raises(DitError, match='127.0.0.1:9.*does not answer.*1 replies') as e: reply(w)
    no_key(tmp_path, e.value)

def test_an_empty_reply_is_no_text(server, tmp_path):
    server.content = lambda request, n: completion(request, None)
    with pytest.raises(DitError, match='no usable text'):
        load_texts(writer(server, tmp_path/'c.jsonl'), labels('news')[:1], 'news', tmp_path/'t.jsonl')

def test_a_story_that_states_its_headline_is_left_out(server, tmp_path):
    row = labels('news')[:1]
    server.content = lambda request, n: completion(request, f'It is true: {row.label[0]}.' if n == 1 else 'It rained.')
    assert writer(server, tmp_path/'c.jsonl').texts(row, 'news')[row.label[0]] == ['It rained.']*2

def test_no_model_or_no_key(tmp_path, monkeypatch):
    for k in ('DIT_MODEL', 'OPENAI_API_KEY', 'OPENAI_BASE_URL'): monkeypatch.delenv(k, raising=False)
    with pytest.raises(DitError, match='DIT_MODEL'): Endpoint(tmp_path/'c')
    with pytest.raises(DitError, match='OPENAI_API_KEY'): Endpoint(tmp_path/'c', 'm')

def test_settings_from_the_environment(server, tmp_path, monkeypatch):
    for k, v in dict(DIT_MODEL='other', OPENAI_API_KEY=KEY, OPENAI_BASE_URL=server.url).items(): monkeypatch.setenv(k, v)
    assert reply(EndpointWriter(Endpoint(tmp_path/'c'))) and server.seen[0]['model'] == 'other'

def test_cost_counts_what_is_missing(server, tmp_path):
    w, rows = writer(server, tmp_path/'c.jsonl', price=(1., 10.)), labels('news')[:100]
    c = cost(w, rows, answer=100)
    assert c['requests'] == 300 and c['tokens_out'] == 30_000 and c['price'] == pytest.approx((c['tokens_in'] + 300_000)/1e6, abs=.01)
    one = w.requests(rows[:1], 'news'); w.endpoint.reply(one[0][1])
    assert cost(w, rows[:1])['requests'] == 2
