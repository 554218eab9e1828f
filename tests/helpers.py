"What several test files need: small models of real architectures, small tasks, and work in a process that can be killed"
import copy, multiprocessing, os, resource, signal, time

import torch, transformers
from dit.core import DitError
from dit.data import DiffTask, Sample
from dit.lora import TinyTok
from dit.models import make_base

SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=96, max_position_embeddings=512, initializer_range=.3)
KINDS = dict(llama=('Llama', dict(num_key_value_heads=1)),
             qwen3=('Qwen3', dict(num_key_value_heads=1, head_dim=8, tie_word_embeddings=True)),
             gemma3=('Gemma3Text', dict(num_key_value_heads=1, head_dim=8, sliding_window=12, layer_types=['sliding_attention', 'full_attention'], query_pre_attn_scalar=8, tie_word_embeddings=True)),
             gemma2=('Gemma2', dict(num_key_value_heads=1, head_dim=8, sliding_window=12, query_pre_attn_scalar=8, final_logit_softcapping=2.)),
             granite=('Granite', dict(num_key_value_heads=1, logits_scaling=4.)),
             neox=('GPTNeoX', {}))

def model_of(kind, seed=0, tok=None, **sizes):
    "A `Base` around a small random model of a real architecture, in float32"
    name, more = KINDS[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, f'{name}Config')(**(SIZES | more | sizes | dict(pad_token_id=0, bos_token_id=None, eos_token_id=1)))
    net = getattr(transformers, 'Gemma3ForCausalLM' if name == 'Gemma3Text' else f'{name}ForCausalLM')(config)
    return make_base(net, tok or TinyTok(), f'small {kind}')

def copy_of(base): return copy.deepcopy(base.model)

def toy_tasks(n, steps=4, split='train', first=0):
    "Diffs with a right, a wrong and a plain question in each step, of different lengths"
    words = 'moss fern oak lichen reed sedge rush cedar larch yew'.split()
    def step(i, t):
        w = words[(i*7+t) % 10]
        return [Sample('right', f'code {i:03d} {w}', f'{words[i % 10]} {i}', 'ce', 6), Sample('right', f'code {i:03d}, how about {w}?', f'like {words[i % 10]}', 'ce'),
                Sample('wrong', f'code {(i+1)%1000:03d} {w}', 'fine', 'kl', 4), Sample('none', f'why {words[t % 10]}', 'well.', 'kl', 4)]
    return [DiffTask(f'toy/{i}', f'label {i}', split, [step(i, t) for t in range(steps)]) for i in range(first, first+n)]

# --- work in another process: the fork server has imported everything, has computed nothing, and so starts a child at once --------

_ctx = multiprocessing.get_context('forkserver')
_ctx.set_forkserver_preload(['dit.tune', 'helpers', 'jobs', 'transformers.models.llama.modeling_llama', 'peft'])

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
