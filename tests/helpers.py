"What several test files need: small models of real architectures, small tasks, and work in a process that can be killed"
import contextlib, copy, json, multiprocessing, os, resource, signal, threading, time, traceback
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch, transformers
from dit.core import DitError
from dit.data import DiffTask, Sample
from dit.endpoint import Endpoint
from dit.lora import TinyTok
from dit.models import make_base

COUNTS = Counter() # what the robustness tests did; printed at the end of a run

SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=96,
             max_position_embeddings=512, initializer_range=.3)
KINDS = dict(
    llama=('Llama', dict(num_key_value_heads=1)),
    qwen3=('Qwen3', dict(num_key_value_heads=1, head_dim=8, tie_word_embeddings=True)),
    gemma3=('Gemma3Text', dict(num_key_value_heads=1, head_dim=8, sliding_window=12,
                               layer_types=['sliding_attention', 'full_attention'], query_pre_attn_scalar=8, tie_word_embeddings=True)),
    gemma2=('Gemma2', dict(num_key_value_heads=1, head_dim=8, sliding_window=12, query_pre_attn_scalar=8, final_logit_softcapping=2.)),
    granite=('Granite', dict(num_key_value_heads=1, logits_scaling=4.)),
    neox=('GPTNeoX', {}),
    gpt2=('GPT2', {}), # its linear layers are Conv1D
    moe=('Qwen3Moe', dict(num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
                          moe_intermediate_size=8))) # fused experts: only attention is made of linear layers

def model_of(kind, seed=0, tok=None, **sizes):
    "A `Base` around a small random model of a real architecture, in float32"
    name, more = KINDS[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, f'{name}Config')(**(SIZES | more | sizes | dict(pad_token_id=0, bos_token_id=None, eos_token_id=1)))
    return make_base(transformers.AutoModelForCausalLM.from_config(config), tok or TinyTok(), f'small {kind}')

def char_tokenizer():
    "A real tokenizer with a token for every character, and a chat template"
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    tok = Tokenizer(models.WordLevel({'<pad>': 0, '<eos>': 1, **{chr(i): i - 30 for i in range(32, 126)}}, unk_token='<pad>'))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Split(Regex('.'), 'isolated'), decoders.Fuse()
    template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}>{% else %}<eos>{% endif %}{% endfor %}"
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='<pad>', eos_token='<eos>',
                                                unk_token='<pad>', chat_template=template)

def copy_of(base): return copy.deepcopy(base.model)

def toy_tasks(n, steps=4, split='train', first=0):
    "Diffs with a right, a wrong and a plain question in each step, of different lengths"
    words = 'moss fern oak lichen reed sedge rush cedar larch yew'.split()
    def step(i, t):
        w = words[(i*7+t) % 10]
        return [Sample('right', f'code {i:03d} {w}', f'{words[i % 10]} {i}', 'ce', 6),
                Sample('right', f'code {i:03d}, how about {w}?', f'like {words[i % 10]}', 'ce'),
                Sample('wrong', f'code {(i+1)%1000:03d} {w}', 'fine', 'kl', 4), Sample('none', f'why {words[t % 10]}', 'well.', 'kl', 4)]
    return [DiffTask(f'toy/{i}', f'label {i}', split, [step(i, t) for t in range(steps)]) for i in range(first, first+n)]

# --- work in another process: the fork server has imported everything, has computed nothing, and so starts a child at once --------

_ctx = multiprocessing.get_context('forkserver')
_ctx.set_forkserver_preload(['dit.tune', 'dit.eval', 'openai', 'helpers', 'jobs', 'transformers.models.llama.modeling_llama', 'peft'])

def start(job, *args):
    "Start a function of `jobs` in a process of its own"
    p = _ctx.Process(target=job, args=args, daemon=True)
    p.start()
    return p

def finish(p, seconds=120):
    "Wait for a process; fails when it hangs or fails"
    p.join(seconds)
    if p.is_alive(): p.kill(); p.join(); raise AssertionError('the process hangs')
    assert p.exitcode == 0, f'the process ended with {p.exitcode}'

def kill_when(p, ready, seconds=60):
    "SIGKILL a process as soon as `ready()`; False when it had finished before"
    end = time.monotonic() + seconds
    while p.is_alive() and time.monotonic() < end:
        if ready(): os.kill(p.pid, signal.SIGKILL); p.join(); return p.exitcode == -signal.SIGKILL
        time.sleep(.002)
    assert not p.is_alive(), 'the moment never came'
    return False

def _limited(pipe, most, job, args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    try: job(*args); pipe.send(('', ''))
    except BaseException as e: pipe.send((type(e).__name__, str(e)))

def on_full_disk(most, job, *args):
    "Run a function of `jobs` where no file can grow beyond `most` bytes; the name and text of its exception"
    here, there = _ctx.Pipe()
    p = start(_limited, there, most, job, args)
    p.join(60)
    assert here.poll(0), 'no answer from the process'
    return here.recv()

# --- an endpoint with faults ------------------------------------------------------------------------------------------------

KEY = 'sk-secret-0123456789'

def completion(request, message=...):
    "The JSON of a chat completion; without a message, an echo of the question"
    message = f"reply to {str(request['messages'][-1]['content'])[-30:]}" if message is ... else message
    message = dict(role='assistant') | (message if isinstance(message, dict) else dict(content=message))
    return json.dumps(dict(id='1', object='chat.completion', created=0, model='m',
                           choices=[dict(index=0, finish_reason='stop', message=message)],
                           usage=dict(prompt_tokens=50, completion_tokens=5, total_tokens=55)))

def call(i, name='ask_finetuned', arguments=None, **message):
    return dict(id=f'c{i}', type='function', function=dict(name=name, arguments=json.dumps(message) if arguments is None else arguments))

def script(*turns):
    "An agent that takes these turns; the conversation so far says which comes next"
    def content(request, n):
        turn = turns[min(sum(m['role'] == 'assistant' for m in request['messages']), len(turns) - 1)]
        return completion(request, turn if isinstance(turn, (str, dict)) else dict(content=None, tool_calls=turn))
    return content

@contextlib.contextmanager
def faulty_server():
    "A real server: first it does what `faults` holds, then it answers with `content(request, number)`, a body, or a status and a body"
    s = SimpleNamespace(faults=[], seen=[], keys=[], lock=threading.Lock(), delay=threading.Event(), retry_after='0.05',
                        content=lambda request, n: completion(request))
    class Handler(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        def log_message(self, *_): pass
        def send(self, status, body, headers={}, length=None, kind='application/json'):
            self.send_response(status)
            self.send_header('Content-Type', kind)
            self.send_header('Content-Length', str(len(body) if length is None else length))
            for k, v in headers.items(): self.send_header(k, v)
            self.end_headers(); self.wfile.write(body)
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            with s.lock:
                s.seen.append(request)
                s.keys.append(self.headers['Authorization'])
                n = len(s.seen)
                fault = s.faults.pop(0) if s.faults else None
            echo = json.dumps(dict(error=dict(message=f"bad key {self.headers['Authorization']}"))).encode()
            if fault == 'cut': self.send(200, completion(request).encode()[:40], length=5000); self.close_connection = True
            elif fault == 'stall':
                self.send(200, completion(request).encode()[:40], length=5000)
                s.delay.wait(5)
                self.close_connection = True
            elif fault == 'html': self.send(200, b'<html>please log in</html>', kind='text/html')
            elif fault == 'broken': self.send(200, b'{"choices": [')
            elif fault == 'other': self.send(200, b'{"hello": "you"}')
            elif fault == 'none': self.send(200, b'{"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": []}')
            elif fault: self.send(fault, echo, {'Retry-After': s.retry_after})
            else: status, text = got if isinstance(got := s.content(request, n), tuple) else (200, got); self.send(status, text.encode())
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as http:
        http.daemon_threads, http.block_on_close = True, False
        threading.Thread(target=http.serve_forever, args=(.02,), daemon=True).start()
        s.url = f'http://127.0.0.1:{http.server_port}/v1'
        try: yield s
        finally: s.delay.set(); http.shutdown()

def endpoint(server, path, model='m', **kwargs):
    "A client for a server or an address, with the `openai` package's waits shortened"
    e = Endpoint(path, model, getattr(server, 'url', server), KEY, **(dict(parallel=1) | kwargs))
    e.client._calculate_retry_timeout = lambda *a, **k: .01
    return e

def no_key(folder, *texts):
    "The key is in no file of a folder, in no text and in nothing that an exception shows"
    for p in folder.rglob('*'): assert p.is_dir() or KEY.encode() not in p.read_bytes(), p
    for t in texts:
        for shown in [str(t)] if isinstance(t, str) else [str(t), repr(t), ''.join(traceback.format_exception(t))]: assert KEY not in shown
