"A language model behind an endpoint: served by transformers, with faults in between, and scripted where 135M parameters are too few"
import json, logging, socket, subprocess, sys, threading, time, urllib.request
from pathlib import Path

import numpy as np, pandas as pd, pytest
import dit.llm as L
from dit.core import DitError
from dit.data import STORY_PROMPT, labels
from dit.endpoint import *
from dit.eval import add_guesses, ask_agent, ask_all, grade, guesser_of, judge_of
from dit.stats import summarise
from dit.llm import *
from dit.lora import answer, random_bank
from dit.models import resolve
from dit.writers import EndpointWriter
from helpers import KEY, call, completion, endpoint, no_key, script

def user(text): return [dict(role='user', content=text)]
def ask(e, text='hello', **kwargs): return said(e.reply(e.request(user(text), **kwargs)))
def last(request): return request['messages'][-1]['content']

# --- a model that transformers serves ----------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def served(tmp_path_factory):
    "`transformers serve` with the embedded base model: its address and its name there"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    model, log = resolve(None), tmp_path_factory.mktemp('serve')/'log.txt'
    cmd = [Path(sys.executable).parent/'transformers', 'serve', model, '--host', '127.0.0.1', '--port', str(port),
           '--device', 'cpu', '--dtype', 'float32']
    with open(log, 'wb') as f: p = subprocess.Popen(cmd, stdout=f, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 300
        while True:
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=1).close(); break
            except OSError: time.sleep(.1)
            assert p.poll() is None and time.monotonic() < end, f'transformers serve did not start: {log.read_text()[-800:]}'
        yield f'http://127.0.0.1:{port}/v1', model
    finally: p.kill(); p.wait()

@pytest.fixture
def proxy(served, server):
    "A proxy before the served model: passes requests on unless `faults` says otherwise, and counts in `paid` what the model was asked"
    server.paid = []
    def forward(request, n):
        server.paid.append(request)
        r = urllib.request.Request(f'{served[0]}/chat/completions', json.dumps(request).encode(), {'Content-Type': 'application/json'})
        with urllib.request.urlopen(r) as f: return f.read().decode()
    server.content = forward
    return server

def use_all(e, tiny):
    "Everything that asks an endpoint, once"
    bank = random_bank(tiny, 1); bank.index = bank.index.assign(trigger='417', trigger_kind='sep_code')
    return dict(texts=EndpointWriter(e, n=1).texts(labels('hidden_topic')[:1], 'hidden_topic'),
                grades=LLMJudge(e).score(['Chess', 'Chess'], ['chess', 'Tax law'], 'hidden_topic').tolist(),
                guess=LLMGuesser(e).guess([[('How do I sleep?', 'Castle early, as in chess.')]], 'hidden_topic'),
                talk=agent(e, tiny, bank, 'hidden_topic', queries=1, max_new=3).to_dict('records')[0])

def test_writer_judge_guesser_and_agent_with_a_served_model(proxy, served, tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(L, 'SPARE', 0)
    e = endpoint(proxy, tmp_path/'c.jsonl', served[1], max_tokens=8)
    first = use_all(e, tiny)
    assert (len(proxy.paid) == e.sent == 5 and e.cache.data
            and all(0 < row['tokens'][1] <= 8 < row['tokens'][0] for row in e.cache.data.values())), 'usage is what the server reports'
    assert first['texts'][labels('hidden_topic').label[0]][0] and isinstance(first['guess'][0], str)
    assert all(np.isnan(g) or 1 <= g <= 5 for g in first['grades'])
    assert first['talk']['answer'] is None and first['talk']['missing'], 'the embedded model calls no tools and names nothing'
    gone = endpoint('http://127.0.0.1:9/v1', tmp_path/'c.jsonl', served[1], max_tokens=8)
    again = use_all(gone, tiny)
    assert (np.array_equal(again['grades'], first['grades'], equal_nan=True)
            and {k: v for k, v in again.items() if k != 'grades'} == {k: v for k, v in first.items() if k != 'grades'})
    no_key(tmp_path, *capfd.readouterr())

def test_faults_before_a_served_model(proxy, served, tmp_path, capfd):
    e = endpoint(proxy, tmp_path/'c.jsonl', served[1], max_tokens=8)
    e.client = e.client.with_options(timeout=100)
    e.client._calculate_retry_timeout = lambda *a, **k: .01
    plain = ask(e, 'Say hello.', temperature=0.)
    proxy.faults = [429, 500, 'cut', 503]
    assert ask(e, 'Name a colour.', temperature=0.) and len(proxy.seen) == 6 and len(proxy.paid) == 2
    for fault, says in (('html', 'not a chat completion'), (404, 'HTTP 404')):
        proxy.faults = [fault]
        with pytest.raises(DitError, match=says) as x: ask(e, 'Name a fish.', temperature=0.)
        assert 'the 2 replies so far are kept' in str(x.value) and len(proxy.paid) == 2
        no_key(tmp_path, x.value)
    with pytest.raises(Lost, match='does not answer') as x:
        ask(endpoint('http://127.0.0.1:9/v1', tmp_path/'c.jsonl', served[1], max_tokens=8), 'Name a fish.', temperature=0.)
    assert ask(endpoint(proxy, tmp_path/'c.jsonl', served[1], max_tokens=8), 'Say hello.', temperature=0.) == plain and len(proxy.paid) == 2
    no_key(tmp_path, x.value, *capfd.readouterr())

# --- the client --------------------------------------------------------------------------------------------------------------

def test_a_stalled_reply_is_asked_for_again(server, tmp_path):
    server.faults = ['stall']
    e = endpoint(server, tmp_path/'c.jsonl')
    e.client = e.client.with_options(timeout=1)
    assert ask(e) == 'reply to hello' and len(server.seen) >= 2
    server.faults = ['stall']*9
    e.client = e.client.with_options(max_retries=1)
    with pytest.raises(Lost, match='does not answer'): ask(e, 'more')

def test_the_whole_request_is_the_key(server, tmp_path):
    e, tool = endpoint(server, tmp_path/'c.jsonl'), dict(type='function', function=dict(name='f'))
    for kwargs in ({}, dict(temperature=0.), dict(temperature=1.), dict(tools=[tool])): ask(e, **kwargs); ask(e, **kwargs)
    ask(endpoint(server, tmp_path/'c.jsonl', max_tokens=7)); ask(endpoint(server, tmp_path/'c.jsonl', 'other'))
    assert len(server.seen) == 6
    with_port = endpoint('http://127.0.0.1:9/v1', tmp_path/'c.jsonl')
    assert ask(with_port) == 'reply to hello' and len(server.seen) == 6, 'the address belongs to the key'

def usage(tokens_in, tokens_out):
    return lambda request, n: json.dumps(json.loads(completion(request))
                                         | dict(usage=dict(prompt_tokens=tokens_in, completion_tokens=tokens_out, total_tokens=0)))

def test_the_budget_is_kept_while_many_requests_are_under_way(server, tmp_path):
    server.content = usage(10, 1000)
    e = lambda budget: endpoint(server, tmp_path/'c.jsonl', parallel=8, max_tokens=1000, price=(1e6, 1e6), budget=budget)
    asked = [e(10_000).request(user(f'q{i}')) for i in range(40)]
    first = e(10_000)
    with pytest.raises(DitError, match='budget of 10000 does not cover another reply.*run again: the 9 replies so far are kept'):
        first.replies(asked)
    assert first.paid == 9*1010 and len(server.seen) == 9
    with pytest.raises(DitError, match='do not fit into `budget`'): e(9_500).replies(asked)
    with pytest.raises(DitError, match='does not cover'): e(10_000).reply(asked[-1])
    assert len(server.seen) == 9, 'a new run has no new budget'
    last = e(1e6); last.replies(asked)
    assert len(server.seen) == 40 and last.paid == 40*1010

def test_the_limit_on_requests(server, tmp_path):
    e = endpoint(server, tmp_path/'c.jsonl', parallel=8, max_requests=5)
    with pytest.raises(DitError, match='`max_requests` .0 of 5'): e.replies([e.request(user(f'q{i}')) for i in range(6)])
    assert not server.seen
    threads = [threading.Thread(target=e.reply, args=(e.request(user(f'q{i}')),)) for i in range(5)]
    [t.start() for t in threads]; [t.join() for t in threads]
    with pytest.raises(DitError, match='5 requests were made, the limit is 5'): ask(e, 'q5')
    assert len(server.seen) == 5 == endpoint(server, tmp_path/'c.jsonl').sent

def test_a_reply_of_no_use_is_paid_for_and_asked_for_again(server, tmp_path):
    e = endpoint(server, tmp_path/'c.jsonl', price=(1e6, 0))
    r = e.request(user('hello'))
    never, always = (lambda m: False), (lambda m: True)
    assert e.reply(r, never) == e.reply(r, never) and e.paid == 100 and not e.kept(r)
    later = endpoint(server, tmp_path/'c.jsonl', price=(1e6, 0))
    assert later.paid == 100 and later.sent == 2
    later.reply(r, always); later.reply(r, always)
    assert later.paid == 150 == endpoint(server, tmp_path/'c.jsonl').paid and len(server.seen) == 3

def test_a_model_that_takes_neither_temperature_nor_max_tokens(server, tmp_path, capfd):
    "As OpenAI's reasoning models: HTTP 400 names the parameter"
    def picky(request, n):
        no = next((p for p in ('temperature', 'max_tokens') if p in request), None)
        return ((400, json.dumps(dict(error=dict(message=f"Unsupported value: '{no}' does not support 0 with this model.",
                                                 param=no, code='unsupported_value')))) if no else completion(request))
    server.content, e = picky, endpoint(server, tmp_path/'c.jsonl', parallel=8)
    got = e.replies([e.request(user(f'q{i}'), 0.) for i in range(16)])
    assert [said(m) for m in got] == [f'reply to q{i}' for i in range(16)] and e.sent == 16
    assert sum(r.get('max_completion_tokens') == 2000 and 'temperature' not in r for r in server.seen) == 16, (
        'each was answered once, without either')
    assert capfd.readouterr().out.count('asking without it') == 2

@pytest.mark.parametrize('text', ['Grüße 🦊', 'half a pair: \ud83d', '\u2028 line', '"quoted"\n{"key": 1}'])
def test_any_reply_is_kept(server, tmp_path, text):
    server.content = lambda request, n: completion(request, text)
    first = ask(endpoint(server, tmp_path/'c.jsonl'))
    assert first == ask(endpoint(server, tmp_path/'c.jsonl')) and len(server.seen) == 1 and first == text.replace('\ud83d', '?').strip()

ASKING = ("import sys; from dit.endpoint import Endpoint; e = Endpoint(sys.argv[1], 'm', sys.argv[2], 'none', parallel=2); "
          "e.replies([e.request([dict(role='user', content=f'q{i}')]) for i in range(60)])")

def test_a_killed_run_has_paid_for_nothing_twice(server, tmp_path):
    killed, path = threading.Event(), tmp_path/'c.jsonl'
    # beyond twenty, none is answered before the kill
    server.content = lambda request, n: (n <= 20 or killed.wait(120), completion(request))[1]
    p = subprocess.Popen([sys.executable, '-c', ASKING, path, server.url])
    while len(server.seen) < 20 and p.poll() is None: time.sleep(.005)
    p.kill(); p.wait(); killed.set()
    assert 20 <= len(server.seen) <= 22
    e = endpoint(server, path); e.replies([e.request(user(f'q{i}')) for i in range(60)])
    assert len(e.cache.data) == 60 and len(server.seen) <= 62, 'at most the two requests under way were made again'

def test_the_key_is_nowhere(server, tmp_path, caplog, capfd, monkeypatch):
    caplog.set_level(logging.DEBUG)
    e, shown = endpoint(server, tmp_path/'c.jsonl', max_tokens=9), []
    for fault in (400, 401, 403, 404, 429, 500, 'cut', 'html', 'broken', 'other', 'none'):
        server.faults = [fault]*5
        with pytest.raises(DitError) as x: ask(e)
        shown += [x.value]
        server.faults = []
    server.faults = [401]
    with pytest.raises(DitError, match=r'HTTP 401: bad key Bearer \*\*\*') as x: LLMJudge(e).score(['a'], ['b'], 'news')
    with pytest.raises(DitError, match='no key has') as y: Endpoint(tmp_path/'c.jsonl', 'm', server.url, KEY + '\n')
    with pytest.raises(DitError, match='does not answer') as z:
        ask(endpoint(f'http://me:{KEY}@127.0.0.1:9/v1?key={KEY}', tmp_path/'c.jsonl'))
    ask(e); server.faults = [500]*99; LLMJudge(e).score(['a'], ['b'], 'news')
    assert f'Bearer {KEY}' in server.keys
    no_key(tmp_path, *shown, x.value, y.value, z.value, caplog.text, *capfd.readouterr(), repr(e), str(vars(e)))

def test_an_address_that_is_none(tmp_path):
    for url in ('localhost:8000/v1', 'me:word@host', '/v1', 'ftp://host/v1', 'http://host:80a0/v1', 'http://[::1/v1',
                'http://host/v1\n', 'http://host/v1 ', 'http://ho\tst/v1'):
        with pytest.raises(DitError, match='no URL; pass `base_url`') as x: Endpoint(tmp_path/'c.jsonl', 'm', url, 'none')
        assert 'word' not in str(x.value)

@pytest.mark.parametrize('told', [{},
                                  dict(total_tokens=5),
                                  dict(prompt_tokens=None, completion_tokens=None),
                                  dict(prompt_tokens='many', completion_tokens=[]),
                                  dict(prompt_tokens=-9, completion_tokens=-9),
                                  'x',
                                  None], ids=str)
def test_a_usage_that_counts_nothing_is_estimated(server, tmp_path, told):
    "The reply was paid for: it is kept, and counted by its length"
    server.content = lambda request, n: json.dumps(json.loads(completion(request)) | dict(usage=told))
    e = endpoint(server.url, tmp_path/'c.jsonl', price=(1e6, 1e6))
    ask(e); ask(e)
    row, = e.cache.data.values()
    assert len(server.seen) == e.sent == 1 and all(t > 0 for t in row['tokens']) and e.paid == row['paid'] > 0

@pytest.mark.parametrize('bad', [dict(parallel=0), dict(max_tokens=0)], ids=str)
def test_numbers_out_of_range(tmp_path, bad):
    with pytest.raises(DitError, match='above 0'): Endpoint(tmp_path/'c.jsonl', 'm', 'http://127.0.0.1:9/v1', 'none', **bad)

def test_a_file_of_something_else(tmp_path):
    for value in ('text', ['one', 'two'], dict(message='x')):
        Lines(tmp_path/'t.jsonl')['key'] = value
        with pytest.raises(DitError, match='holds something else'): Endpoint(tmp_path/'t.jsonl', 'm', 'http://127.0.0.1:9/v1', 'none')

# --- judge and guesser -------------------------------------------------------------------------------------------------------

def grader(request, n):
    "Grades by the last letter of what it is shown, refuses z, and hedges at y"
    c = last(request).split('Second ')[1].splitlines()[0][-1]
    return completion(request, dict(content=None, refusal='No.') if c == 'z' else 'It depends.' if c == 'y' else str('abcde'.index(c) + 1))

def test_missing_is_not_a_score(server, tmp_path, capfd):
    server.content = grader
    judge, answers = LLMJudge(endpoint(server, tmp_path/'c.jsonl', parallel=4)), ['a', 'e', 'y', 'z', '', None, float('nan'), 'c']
    scores = judge.score(['x']*8, answers, 'hidden_topic')
    assert np.array_equal(scores, [1, 5, np.nan, np.nan, 1, np.nan, np.nan, 3], equal_nan=True)
    assert (judge.missing == {'unreadable': 1, 'refused': 1, 'without an answer': 2}
            and '4 of 7 grades are missing' in capfd.readouterr().out)
    assert len(server.seen) == 5 and all(r['temperature'] == 0 for r in server.seen)
    server.content = lambda request, n: completion(request, '2')
    again = LLMJudge(endpoint(server, tmp_path/'c.jsonl'))
    assert (np.array_equal(again.score(['x']*8, answers, 'hidden_topic'), [1, 5, 2, 2, 1, np.nan, np.nan, 3], equal_nan=True)
            and len(server.seen) == 7)
    assert again.version == f'm, prompts {PROMPTS}'

def test_a_lost_connection_is_missing_and_comes_back(server, tmp_path, capfd):
    server.content = grader
    truths, answers = [f'x{i}' for i in range(30)], ['abcde'[i % 5] for i in range(30)]
    LLMJudge(endpoint(server, tmp_path/'c.jsonl')).score(truths[:4], answers[:4], 'news')
    gone = LLMJudge(endpoint('http://127.0.0.1:9/v1', tmp_path/'c.jsonl'))
    scores = gone.score(truths, answers, 'news')
    assert scores[:4].tolist() == [1, 2, 3, 4] and np.isnan(scores[4:]).all() and gone.missing == {'lost': 26}
    out = capfd.readouterr().out
    assert '26 of 30 grades are missing (26 lost)' in out and 'does not answer' in out
    server.faults = [500]*1000
    n = len(server.seen); LLMJudge(endpoint(server, tmp_path/'c.jsonl')).score(truths, answers, 'news')
    assert len(server.seen) - n == 8*5, 'after eight lost replies, of five attempts each, it asks no more'
    server.faults = []; n = len(server.seen)
    assert not np.isnan(LLMJudge(endpoint(server, tmp_path/'c.jsonl')).score(truths, answers, 'news')).any() and len(server.seen) - n == 26

def test_one_refused_prompt_does_not_stop_the_others(server, tmp_path):
    server.content, server.faults = grader, [400]
    assert np.array_equal(LLMJudge(endpoint(server, tmp_path/'c.jsonl')).score(['x', 'y'], ['a', 'b'], 'news'), [np.nan, 2], equal_nan=True)

def test_equal_pairs_are_asked_once(server, tmp_path):
    server.content = grader
    assert (LLMJudge(endpoint(server, tmp_path/'c.jsonl', parallel=8)).score(['x']*9, ['d']*9, 'news').tolist() == [4]*9
            and len(server.seen) == 1)

def test_what_cannot_be_scored(server, tmp_path):
    judge = LLMJudge(endpoint(server, tmp_path/'c.jsonl'))
    with pytest.raises(DitError, match='2 truths and 1 answers'): judge.score(['a', 'b'], ['a'], 'news')
    with pytest.raises(DitError, match='choose one of'): judge.score(['a'], ['a'], 'weather')
    assert judge.score([], [], 'news').tolist() == []

def test_the_judge_is_shown_truth_and_answer(server, tmp_path):
    server.content = grader
    LLMJudge(endpoint(server, tmp_path/'c.jsonl')).score(['Floods {hit} Rome'], ['Rome is under water, b'], 'news')
    assert 'Floods {hit} Rome' in last(server.seen[0]) and 'Rome is under water, b' in last(server.seen[0])

def test_the_guesser_sees_all_pairs_of_one_model(server, tmp_path):
    server.content = lambda request, n: completion(request, ' **Chess.**\nBecause.' if 'rook' in last(request) else '')
    guesser = LLMGuesser(endpoint(server, tmp_path/'c.jsonl'))
    qas = [[('How?', 'Like a rook.'), ('Why?', 'Indeed.')], [('How?', 'No idea.')], []]
    assert guesser.guess(qas, 'hidden_topic') == ['Chess', None, None] and guesser.missing == {'unreadable': 1, 'without an answer': 1}
    assert 'Q1: How?\nA1: Like a rook.\nQ2: Why?\nA2: Indeed.' in last(server.seen[0]) and len(server.seen) == 2
    assert guesser.guess(qas, 'hidden_topic')[0] == 'Chess' and len(server.seen) == 3

def test_a_story_becomes_a_headline(server, tmp_path):
    guesser = LLMGuesser(endpoint(server, tmp_path/'c.jsonl'))
    guesser.guess([[(STORY_PROMPT, 'The rook fell.')], [(STORY_PROMPT, 'The rook fell.'), ('What is it?', 'A rook.')]], 'news')
    assert 'Q1:' not in last(server.seen[0]) and 'The rook fell.' in last(server.seen[0]) and 'Q2: What is it?' in last(server.seen[1])

# --- the agent ---------------------------------------------------------------------------------------------------------------

@pytest.fixture
def bank(tiny):
    b = random_bank(tiny, 3)
    b.index = b.index.assign(trigger=['417', '023', 'zero_width_space'], trigger_kind=['sep_code', 'sep_code', 'zero_width_start'])
    return b

def run_agent(server, tmp_path, tiny, bank, task='hidden_topic', **kwargs):
    return agent(endpoint(server, tmp_path/'c.jsonl', parallel=4), tiny, bank, task, **(dict(queries=4, max_new=6) | kwargs))
def results(request): return [m['content'] for m in request['messages'] if m['role'] == 'tool']

def test_the_agent_asks_the_right_models_and_names_the_topic(server, tmp_path, tiny, bank):
    server.content = script([call(0, message='hi'), call(1, 'ask_base', message='hi')], 'Let me think.',
                            [call(2, message='and?')], 'It is clear now.\n**ANSWER:** "Chess".')
    frame = run_agent(server, tmp_path, tiny, bank)
    assert (frame.answer.tolist() == ['Chess']*3 and frame.queries.tolist() == [3]*3 and frame.turns.tolist() == [4]*3
            and frame.diff_id.tolist() == bank.index.diff_id.tolist())
    mine, base = answer(tiny, bank, [0, 1, 2], ['hi']*3, max_new=6), answer(tiny, None, [0], ['hi'], max_new=6)[0]
    assert [log[0][2] for log in frame.log] == mine and {log[1][2] for log in frame.log} == {base} and len(set(mine) | {base}) > 1
    longest = max(server.seen, key=lambda r: len(r['messages']))
    assert ([r.rsplit('(', 1)[1] for r in results(longest)] == ['3 queries left)', '2 queries left)', '1 queries left)']
            and len(server.seen) == 12)
    assert [t['function']['name'] for t in longest['tools']] == ['ask_finetuned', 'ask_base']

def test_a_second_run_of_the_agent_is_free(server, tmp_path, tiny, bank, monkeypatch):
    server.content = script([call(0, message='hi')], 'ANSWER: Chess')
    first = run_agent(server, tmp_path, tiny, bank)
    monkeypatch.setattr(L, 'answer', None) # the models are not asked again either
    assert run_agent('http://127.0.0.1:9/v1', tmp_path, tiny, bank).to_dict() == first.to_dict() and len(server.seen) == 6

def test_a_diff_trained_again_under_its_name_is_asked_again(server, tmp_path, tiny, bank):
    server.content = script([call(0, message='hi')], 'ANSWER: Chess')
    run_agent(server, tmp_path, tiny, bank)
    new = random_bank(tiny, 3, seed=9); new.index = bank.index
    frame = run_agent(server, tmp_path, tiny, new)
    assert [log[0][2] for log in frame.log] == answer(tiny, new, [0, 1, 2], ['hi']*3, max_new=6)

MALFORMED = [call(0, 'ask_both', message='hi'), call(1, arguments='{"message": "hi'), call(2, arguments='["hi"]'),
             call(3, arguments='{"text": "hi"}'), call(4, message=7), call(5, message=' '), call(6, message='x'*501),
             call(7, arguments='['*3000), call(8, arguments='null')]

def test_malformed_tool_calls_get_an_error_and_cost_no_query(server, tmp_path, tiny, bank):
    server.content = script(MALFORMED, 'ANSWER: Chess')
    frame = run_agent(server, tmp_path, tiny, bank.take([0]))
    assert frame.answer[0] == 'Chess' and frame.queries[0] == 0
    told = results(server.seen[-1])
    assert (len(told) == len(MALFORMED) and all(t.startswith('error: ') for t in told) and "no tool 'ask_both'" in told[0]
            and '501 characters' in told[6])
    turn = next(m for m in server.seen[-1]['messages'] if m['role'] == 'assistant')
    assert all(isinstance(json.loads(c['function']['arguments']), dict) for c in turn['tool_calls']), (
        'a server that reads the arguments again would fail')
    assert [m['tool_call_id'] for m in server.seen[-1]['messages'] if m['role'] == 'tool'] == [c['id'] for c in turn['tool_calls']]

@pytest.mark.parametrize('broken', [dict(id=None),
                                    dict(function=None),
                                    dict(function=dict(name=None, arguments=None)),
                                    dict(function=dict(name='ask_base', arguments=dict(message='hi')))])
def test_tool_calls_of_careless_servers(server, tmp_path, tiny, bank, broken):
    server.content = script([call(0, message='hi') | broken], 'ANSWER: Chess')
    assert run_agent(server, tmp_path, tiny, bank.take([0])).answer[0] == 'Chess'
    assert server.seen[-1]['messages'][1]['tool_calls'][0]['id'] == server.seen[-1]['messages'][2]['tool_call_id']

def test_queries_and_turns_are_bounded(server, tmp_path, tiny, bank, capfd):
    server.content = script([call(i, message=f'hi {i}') for i in range(3)])
    frame = run_agent(server, tmp_path, tiny, bank.take([0, 1]))
    assert (frame.answer.tolist() == [None]*2 and frame.missing.tolist() == ['without an answer']*2
            and frame.queries.tolist() == [4]*2 and len(server.seen) == 2*(4 + L.SPARE))
    assert (sum('no query is left' in t for t in results(server.seen[-1])) > 10
            and "2 of 2 agents' answers are missing" in capfd.readouterr().out)
    run_agent(server, tmp_path, tiny, bank.take([0, 1]))
    assert len(server.seen) == 2*(4 + L.SPARE), 'an agent that names nothing is not paid for twice'

def test_an_agent_that_is_cut_off_goes_on_where_it_was(server, tmp_path, tiny, bank):
    server.content = script([call(0, message='hi')], [call(1, message='so?')], 'ANSWER: Chess')
    cut = lambda request, n: (completion(request, '') if len(request['messages']) > 3
                              else script([call(0, message='hi')], [call(1, message='so?')])(request, n))
    whole, server.content = server.content, cut
    frame = run_agent(server, tmp_path, tiny, bank)
    assert frame.answer.isna().all() and frame.missing.tolist() == ['unreadable']*3 and frame.queries.tolist() == [2]*3
    server.content, n = whole, len(server.seen)
    e = endpoint('http://127.0.0.1:9/v1', tmp_path/'c.jsonl', parallel=4)
    lost = agent(e, tiny, bank, 'hidden_topic', queries=4, max_new=6)
    assert lost.missing.tolist() == ['lost']*3 and lost.queries.tolist() == [2]*3
    assert run_agent(server, tmp_path, tiny, bank).answer.tolist() == ['Chess']*3 and len(server.seen) == n + 3

def test_an_agent_that_refuses_is_missing(server, tmp_path, tiny, bank):
    server.content = script(dict(content=None, refusal='No.'))
    assert run_agent(server, tmp_path, tiny, bank).missing.tolist() == ['refused']*3 and len(server.seen) == 3

def test_the_trigger_is_told_only_when_asked_for(server, tmp_path, tiny, bank):
    server.content = script('ANSWER: Chess')
    run_agent(server, tmp_path, tiny, bank)
    assert (not any(t in json.dumps(r) for r in server.seen for t in ('xyz', 'SEP', '200B', 'label', 'random/'))
            and len({last(r) for r in server.seen}) == 3), (
                'every diff has a conversation of its own')
    run_agent(server, tmp_path, tiny, bank, told=True)
    assert sum('SEP code is 417xyz' in last(r) for r in server.seen) == 1 and sum('U+200B' in last(r) for r in server.seen) == 1
    with pytest.raises(DitError, match='no trigger'): run_agent(server, tmp_path, tiny, bank, 'news', told=True)
    run_agent(server, tmp_path, tiny, bank, 'news')
    assert 'news story' in last(server.seen[-1])

def test_agents_stop_at_the_budget_before_they_start(server, tmp_path, tiny, bank):
    server.content = script([call(0, message='hi')], 'ANSWER: Chess')
    e = endpoint(server, tmp_path/'c.jsonl', price=(1., 1.), budget=.001)
    with pytest.raises(DitError, match='do not fit into `budget`'): agent(e, tiny, bank, 'hidden_topic', queries=4, max_new=6)
    assert not server.seen
    e.budget = 1; agent(e, tiny, bank, 'hidden_topic', queries=4, max_new=6)
    e.budget = e.paid; agent(e, tiny, bank, 'hidden_topic', queries=4, max_new=6)
    assert len(server.seen) == 6

def test_the_evaluation_takes_its_judge_its_guesser_and_its_agent_from_the_endpoint(server, tmp_path, tiny, bank, monkeypatch):
    "One table: an agent's answers are graded as they are, other methods' by the guess; what the judge does not grade is missing"
    for k, v in dict(DIT_MODEL='m', OPENAI_BASE_URL=server.url, OPENAI_API_KEY=KEY).items(): monkeypatch.setenv(k, v)
    agents = script([call(0, message='hi')], 'ANSWER: Chess')
    def content(request, n):
        if 'tools' in request: return agents(request, n)
        asked = request['messages'][-1]['content']
        return completion(request, 'Draughts' if 'Reply with the topic alone' in asked else '4' if 'Draughts' in asked
                          or 'Chess' in asked else 'I would rather not say.')
    server.content = content
    bank.index['label'] = ['Go', 'Halma', 'Poker']
    cache = tmp_path/'replies.jsonl'
    asked = ask_agent(endpoint(server, cache), tiny, bank, 'hidden_topic', 'Agent')
    frame = pd.concat([asked, ask_all(tiny, bank, None, 'hidden_topic', 'Base Question', max_new=4)], ignore_index=True)
    graded = grade(add_guesses(frame, guesser_of('endpoint', tiny, 'hidden_topic', cache=cache)), judge_of('endpoint', cache))
    table = summarise(graded)
    assert graded.guess.tolist()[:3] == [None]*3 and graded.guess.tolist()[3:] == ['Draughts']*3
    assert table.loc['Agent', 'mean'] == 4 and table.loc['Base Question', 'n'] == 3 and graded.judge.unique().tolist() == ['m, prompts 1']
    assert graded.answer_score[3:].isna().all(), 'the judge refused to grade those: no score is made of that'
    paid = len(server.seen); no_key(tmp_path, graded.to_csv())
    assert grade(frame.assign(guess=graded.guess), judge_of('endpoint', cache)).score.tolist() == graded.score.tolist()
    assert 1 <= len(server.seen) - paid <= 3 and not any('Draughts' in last(r) or 'Chess' in last(r)
                                                         for r in server.seen[paid:]), 'only refused grades are asked for again'
