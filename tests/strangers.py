"Broken files: what somebody may hand to each reader. All are made by code, from seeds"
import json, os, random, struct, zipfile
from pathlib import Path

import pandas as pd, torch
from dit.endpoint import Endpoint, Lines
from dit.ask import open_adapter, open_diff
from dit.core import write_csv
from dit.data import read_table
from dit.eval import save_results
from dit.lora import *
from dit.models import fingerprint, load_base
from dit.stats import read_results
from dit.tune import Adapter, load_state, save_state
from dit.writers import load_texts
from safetensors.torch import save_file

ODD = ['=cmd|" /C calc"!A0', '+1', '-1+1', '@SUM(A1)', "'=1", '\x1b[31mred\x1b]0;title\x07', 'שלום \u202etxt.exe', '🦊👩‍🔬',
       'a, "b"\nc', 'x\ry', '<script>alert(1)</script>', '$\\input{/etc/passwd}$', 'NA', '007', '\u200bmoss', 'é'*300]

class Bomb:
    "Runs a command when it is unpickled"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f'touch {self.path}',)

# --- one good file or folder per reader, and how it is read: make(folder, tiny), read(folder, tiny) ---------------------------------

def labels(base, n=3): return pd.DataFrame(dict(topic=[*ODD[9:9+n]], category='c'))
def make_table(f, base): f.mkdir(); labels(base).to_csv(f/'labels.csv', index=False, quoting=2)
def read_labels(f, base): return read_table(f/'labels.csv', ('topic', 'category'))

def make_bank(f, base):
    open_bank(f, base, rank=2, scaling=.5)
    for s in (1, 2):
        bank = random_bank(base, 3, 2, .5, s)
        bank.index = bank.index.assign(diff_id=[f'{s}/{i}' for i in range(3)], label=ODD[3*s:3*s+3], sound=True, learnt=True, loss=1.)
        save_shard(f, bank)
def make_peft(f, base): to_peft(random_bank(base, 1, 2), 0, f, base)
def make_full(f, base):
    f.mkdir()
    save_file({k: (t + .01).contiguous() for k, t in base.model.state_dict().items() if 'lm_head' not in k}, f/'model.safetensors')
def pairs(base): b = random_bank(base, 1, 2); return {n: (b.B[n][0].T.contiguous(), b.A[n][0].T.contiguous()) for n in b.A}
def make_paper(f, base):
    (f/'weight-diffs').mkdir(parents=True)
    torch.save([dict(topic=t, weight_diff=pairs(base)) for t in ('moss', '🦊')], f/'weight-diffs'/'weight-diff-000.pt')
    (f/'index.csv').write_text('lora_path,lora_idx,topic\nweight-diff-000.pt,0,moss\nweight-diff-000.pt,1,fern\n')
def make_adapter(f, base): f.mkdir(); torch.save({n: (B.T.contiguous(), A.T.contiguous()) for n, (B, A) in pairs(base).items()}, f/'a.pt')
class Nobody:
    def texts(self, rows, task): return {l: ['written again'] for l in rows.label}
def make_texts(f, base):
    for t in ('moss', 'fern'): Lines(f/'text.jsonl')[t] = [f'{t} is here.', *ODD]
def read_texts(f, base): return load_texts(Nobody(), pd.DataFrame(dict(label=['moss', 'fern'])), 'news', f/'text.jsonl')
def make_replies(f, base): Lines(f/'c.jsonl')['k'] = dict(message=dict(content='hi'), usable=True, tokens=[1, 1], requests=1, paid=.1)
def read_replies(f, base): return Endpoint(f/'c.jsonl', 'm', 'http://127.0.0.1:9/v1', 'none').paid
FACTS = dict(rank=2, epochs=5)
def run_of(base):
    a = Adapter(base, 2, 0); opt = torch.optim.AdamW(a.parameters()); a.lora.p.grad = torch.ones_like(a.lora.p); opt.step()
    return a, opt, torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.)
def make_checkpoint(f, base):
    save_state(f/'checkpoint.pt', *run_of(base), pd.DataFrame(dict(epoch=[1], train_loss=[2.], val_loss=[2.])), FACTS)
def read_checkpoint(f, base): return load_state(f/'checkpoint.pt', *run_of(base), FACTS)
def make_results(f, base):
    save_results(pd.DataFrame(dict(diff_id=[f'x/{i}' for i in range(len(ODD))], method='DIT', truth=ODD, answer=ODD[::-1],
                                   judge='offline-1', score=2.5)), f/'news.csv')

def make_base_model(f, base):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(['<unk>', '|', *'abcdefgh'])}, '<unk>'))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tok = PreTrainedTokenizerFast(tokenizer_object=words, unk_token='<unk>', eos_token='|')
    tok.chat_template = "{% for m in messages %}{{ m['content'] }} | {% endfor %}"
    base.model.save_pretrained(f); tok.save_pretrained(f)
def read_base_model(f, base): base = load_base(str(f), dtype=torch.float32); return fingerprint(base), base.eot

READERS = dict(base=(make_base_model, read_base_model, ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']),
               table=(make_table, read_labels, ['labels.csv']),
               bank=(make_bank, lambda f, b: load_bank(f, b).here(), ['bank.json', 'index.csv', 'shard-00001.safetensors']),
               peft=(make_peft, from_peft, ['adapter_config.json', 'adapter_model.safetensors']),
               full=(make_full, lambda f, b: open_diff(str(f), b), ['model.safetensors']),
               paper=(make_paper, lambda f, b: open_diff(f'{f}#0', b), ['index.csv', 'weight-diffs/weight-diff-000.pt']),
               adapter=(make_adapter, lambda f, b: open_adapter(str(f/'a.pt'), b), ['a.pt']),
               texts=(make_texts, read_texts, ['text.jsonl']), replies=(make_replies, read_replies, ['c.jsonl']),
               checkpoint=(make_checkpoint, read_checkpoint, ['checkpoint.pt']),
               results=(make_results, lambda f, b: read_results(f/'news.csv'), ['news.csv']))

# --- damage that any file can suffer -------------------------------------------------------------------------------------------------

def cut(seed): return lambda raw: raw[:random.Random(f'cut {seed}').randrange(1, max(2, len(raw)))]
def flip(seed):
    def damage(raw):
        raw, r = bytearray(raw), random.Random(f'flip {seed}')
        for _ in range(1 + seed % 4): raw[r.randrange(len(raw) if seed % 2 else min(len(raw), 400))] ^= 1 << r.randrange(8)
        return bytes(raw)
    return damage
ANY = {'empty': lambda raw: b'', 'noise': lambda raw: random.Random(0).randbytes(2000),
       'zeros': lambda raw: bytes(len(raw)), 'html': lambda raw: b'<html>please log in</html>',
       'zip': lambda raw: b'PK\x03\x04' + raw, 'longer': lambda raw: raw + b'\x00'*50, 'twice': lambda raw: raw + raw,
       'pointer': lambda raw: b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n',
       **{f'cut {i}': cut(i) for i in range(4)}, **{f'flip {i}': flip(i) for i in range(6)}}
ENCODINGS = {'utf-16': lambda raw: raw.decode().encode('utf-16'), 'latin-1': lambda raw: 'é;ö\n'.encode('latin-1') + raw,
             'bom': lambda raw: b'\xef\xbb\xbf' + raw, 'crlf': lambda raw: raw.replace(b'\n', b'\r\n')}

def in_file(name, damage):
    def apply(f, base): (f/name).write_bytes(damage((f/name).read_bytes()))
    return apply
def gone(name): return lambda f, base: (f/name).unlink()
def folder_instead(name): return lambda f, base: ((f/name).unlink(), (f/name).mkdir())

# --- damage that somebody thought of -------------------------------------------------------------------------------------------------

def header(name, entries, size=None, data=b'\x00'*64): # a safetensors file by hand
    def apply(f, base):
        text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
        (f/name).write_bytes(struct.pack('<Q', len(text) if size is None else size) + text + data)
    return apply
LORA = 'base_model.model.model.layers.0.self_attn.q_proj.lora_'
def entry(shape, end=64, dtype='F32', start=0): return dict(dtype=dtype, shape=shape, data_offsets=[start, end])
HEADERS = {'size 2^62': (b'{}', 1 << 62), 'size 2^40': (b'{}', 1 << 40), 'size 0': (b'{}', 0),
           'deep': (b'['*50_000, None), 'list': (b'[]', None), 'not utf-8': (b'{"\xff\xfe": 1}', None),
           'nothing': (b'{}', None), 'shape 10^24': ({LORA + 'A.weight': entry([10**12, 10**12])}, None),
           'shape overflow': ({LORA + 'A.weight': entry([2**63, 2])}, None), 'negative': ({LORA + 'A.weight': entry([-4, 4])}, None),
           'offsets beyond': ({LORA + 'A.weight': entry([4, 4], 10**15)}, None),
           'offsets overlap': ({LORA + 'A.weight': entry([4, 4]), LORA + 'B.weight': entry([4, 4], 80, start=16)}, None),
           'a scalar': ({LORA + 'A.weight': entry([], 4), LORA + 'B.weight': entry([15], 64, start=4)}, None),
           'empty tensor': ({LORA + 'A.weight': entry([0, 16], 0), LORA + 'B.weight': entry([4, 4])}, None),
           'unknown type': ({LORA + 'A.weight': entry([4, 4], dtype='Q7')}, None),
           'steering name': ({'\x1b[2J\x1b]0;x\x07\nDitError: all good': entry([4, 4])}, None),
           'emoji name': ({'🦊.lora_A.weight': entry([4, 4])}, None), 'long name': ({'x'*100_000: entry([4, 4])}, None),
           'right to left': ({'\u202egnihton.lora_A.weight': entry([4, 4])}, None)}

def tensors(name, change): # the file's tensors, changed
    def apply(f, base):
        ts = load_file(f/name)
        k = sorted(t for t in ts if 'layers.0.self_attn.q_proj' in t)[0]
        save_file({n: t.contiguous() for n, t in change(ts, k).items()}, f/name)
        if (f/'index.csv').exists(): # a bank whose index agrees with its shard
            index = read_index(f); index.loc[index.shard == name, 'sha256'] = sha256_of(f/name)[:16]; write_csv(f/'index.csv', index)
    return apply
from dit.core import sha256_of
from safetensors.torch import load_file
TENSORS = {'int64': lambda ts, k: ts | {k: ts[k].long()}, 'bool': lambda ts, k: ts | {k: ts[k] > 0},
           'float8': lambda ts, k: ts | {k: ts[k].to(torch.float8_e4m3fn)},
           'complex': lambda ts, k: ts | {k: ts[k].to(torch.complex64)}, 'nan': lambda ts, k: ts | {k: ts[k]*float('nan')},
           'inf': lambda ts, k: ts | {k: ts[k]/0.}, 'one dimension': lambda ts, k: ts | {k: ts[k].flatten()},
           'no dimension': lambda ts, k: ts | {k: torch.tensor(1.)}, 'one more dimension': lambda ts, k: ts | {k: ts[k][None, None]},
           'transposed': lambda ts, k: ts | {k: ts[k].mT}, 'one missing': lambda ts, k: {n: t for n, t in ts.items() if n != k},
           'none left': lambda ts, k: {'x': ts[k]}, 'wider': lambda ts, k: ts | {k: torch.cat([ts[k]]*3, -1)},
           'rank 0': lambda ts, k: {n: t[..., :0, :] if n.replace('.weight', '').endswith('A') else t[..., :0] for n, t in ts.items()}}

ALPHAS = {'text': 'eight', 'null': None, 'infinite': float('inf'), 'nan': float('nan'), 'list': [8], 'enormous': 10**400}
def config(**change):
    def apply(f, base):
        c = json.loads((f/'adapter_config.json').read_text()) | change
        (f/'adapter_config.json').write_text(json.dumps({k: v for k, v in c.items() if v != 'leave out'}))
    return apply
CONFIGS = {**{f'alpha {k}': config(lora_alpha=v) for k, v in ALPHAS.items()}, 'alpha missing': config(lora_alpha='leave out'),
           'alpha 0': config(lora_alpha=0), 'alpha below 0': config(lora_alpha=-3), 'pattern list': config(alpha_pattern=[1]),
           'pattern broken': config(alpha_pattern={'(': 1}), 'pattern slow': config(alpha_pattern={'(([a-z._0-9])+)+!': 1}),
           'pattern slow too': config(alpha_pattern={'.*.*.*.*.*.*.*.*!': 1}), 'pattern text': config(alpha_pattern={'q_proj': 'x'}),
           'dora': config(use_dora=True), 'ia3': config(peft_type='IA3'), 'type list': config(peft_type=['LORA']),
           'pissa': config(init_lora_weights='pissa'), 'remote code': config(auto_mapping=dict(parent_library='os')),
           'base with steering': config(base_model_name_or_path='\x1b[2Jx'), 'base a list': config(base_model_name_or_path=[1])}

def index(change): # a bank's index, changed
    def apply(f, base): frame = pd.read_csv(f/'index.csv', dtype=str); change(frame).to_csv(f/'index.csv', index=False)
    return apply
def cell(column, value): return index(lambda x: x.assign(**{column: [value] + x[column].tolist()[1:]}))
INDEX = {**{f'shard {p!r}': cell('shard', p)
            for p in ('../shard-00000.safetensors', '/etc/passwd', '..', '.', '', 'sub/x.safetensors',
                      '\x1b[2J', 'bank.json', 'x'*5000, 'shard-00009.safetensors')},
         **{f'position {p}': cell('position', p) for p in ('-1', '3', '99999999999999999999', '1.5', 'one', '')},
         'rows twice': index(lambda x: pd.concat([x, x])), 'row of another shard': cell('sha256', '0'*16),
         'sha missing': cell('sha256', ''),
         **{f'no {c}': index(lambda x, c=c: x.drop(columns=c)) for c in ('diff_id', 'label', 'shard', 'position', 'sha256')},
         'sound is text': cell('sound', 'maybe'), 'learnt is text': cell('learnt', 'maybe'),
         'learnt is a number': cell('learnt', '7'), 'learnt is not known': cell('learnt', ''), 'loss is text': cell('loss', '=1+1'),
         'no rows': index(lambda x: x[:0]), 'mixed': index(lambda x: x.iloc[[0, 3, 1, 4, 2, 5]])}

def facts(text):
    return lambda f, base: (f/'bank.json').write_text(text if isinstance(text, str)
                                                      else json.dumps(json.loads((f/'bank.json').read_text()) | text))
BANK = {'deep': facts('['*100_000), 'text': facts('"bank"'), 'number': facts('1'), 'null': facts('null'), 'list': facts('[1]'),
        'other base': facts(dict(fingerprint='0'*16, base='\x1b[2Jother')), 'fingerprint a list': facts(dict(fingerprint=[1])),
        **{f'scaling {k}': facts(dict(scaling=v)) for k, v in ALPHAS.items()}}

def pt(name, content): # content(base, folder)
    def apply(f, base): torch.save(content(base, f), f/name)
    return apply
D = 'weight-diffs/weight-diff-000.pt'
def expanded(base): n, (b, a) = next(iter(pairs(base).items())); return {n: (torch.zeros(1, 1).expand(10**6, 10**6), a)}
def changed(base, how): n, (b, a) = next(iter(pairs(base).items())); return pairs(base) | {n: how(b, a)}
def deflated(f, base):
    with zipfile.ZipFile(f/D) as z: parts = {i.filename: z.read(i) for i in z.infolist()}
    with zipfile.ZipFile(f/D, 'w', zipfile.ZIP_DEFLATED) as z:
        for n, raw in parts.items(): z.writestr(n, raw)
CONTENTS = {'bomb': lambda base, f: Bomb(f.parent/'was-here'), 'a million by a million': lambda base, f: expanded(base),
            'sparse': lambda base, f: changed(base, lambda b, a: (b.to_sparse(), a)),
            'integers': lambda base, f: changed(base, lambda b, a: (b.long(), a.long())),
            'three of them': lambda base, f: changed(base, lambda b, a: (b[None], a[None])),
            'numbers': lambda base, f: changed(base, lambda b, a: (1, 2)), 'text': lambda base, f: changed(base, lambda b, a: 'ab'),
            'one': lambda base, f: changed(base, lambda b, a: (b,)), 'none': lambda base, f: changed(base, lambda b, a: None),
            'scalars': lambda base, f: changed(base, lambda b, a: (torch.tensor(1.), torch.tensor(1.))),
            'nan': lambda base, f: changed(base, lambda b, a: (b*float('nan'), a)),
            'number keys': lambda base, f: {1: next(iter(pairs(base).values()))},
            'no key': lambda base, f: {None: next(iter(pairs(base).values()))}, 'nothing': lambda base, f: {},
            'other names': lambda base, f: {'x.y': next(iter(pairs(base).values()))},
            'mixed with tensors': lambda base, f: changed(base, lambda b, a: b),
            'swapped': lambda base, f: changed(base, lambda b, a: (a, b))}
WHOLE = {'a tensor': lambda base, f: torch.ones(3), 'a number': lambda base, f: 5, 'a list of numbers': lambda base, f: [1, 2],
         'an empty list': lambda base, f: [], 'no weights': lambda base, f: [dict(topic='x')], 'text': lambda base, f: 'x',
         'nested bomb': lambda base, f: [dict(topic='x', weight_diff=dict(a=Bomb(f.parent/'was-here')))]}
PAPER = {'leaves': 'lora_path,lora_idx,topic\n../../x.pt,0,a\n', 'absolute': 'lora_path,lora_idx,topic\n/etc/passwd,0,a\n',
         'nul': 'lora_path,lora_idx,topic\na\x00b.pt,0,a\n', 'long': f"lora_path,lora_idx,topic\n{'x'*9000}.pt,0,a\n",
         'row text': 'lora_path,lora_idx,topic\nweight-diff-000.pt,zero,a\n',
         'row enormous': f"lora_path,lora_idx,topic\nweight-diff-000.pt,{'9'*5000},a\n",
         'row other digits': 'lora_path,lora_idx,topic\nweight-diff-000.pt,٠,a\n', 'blank': 'lora_path,lora_idx,topic\n,,\n',
         'columns': 'a,b\n1,2\n', 'steering': 'lora_path,lora_idx,topic\n\x1b[2J\x07.pt,0,a\n',
         'not there': 'lora_path,lora_idx,topic\nweight-diff-7.pt,0,a\n'}

def lines(name, text): return lambda f, base: (f/name).write_bytes(text if isinstance(text, bytes) else text.encode())
def row(key, value): return json.dumps(dict(key=key, value=value)) + '\n'
TEXTS = {'value text': row('moss', 'abc'), 'value number': row('moss', 5), 'value null': row('moss', None),
         'value empty': row('moss', []), 'texts numbers': row('moss', [1, 2]), 'texts empty': row('moss', ['', ' ']),
         'key a list': row(['moss'], ['x']), 'deep': '['*100_000 + '\n', 'no key': '{}\n', 'surrogate': row('moss', ['\ud800 here']),
         'not utf-8': b'{"key": "moss", "value": ["\xff"]}\n', 'nul': row('moss', ['a\x00b']), 'dict': row('moss', dict(a=1))}
REPLIES = {'text': row('k', 'x'), 'list': row('k', [1]), 'null': row('k', None),
           'no message': row('k', dict(requests=1, paid=0)), 'message text': row('k', dict(requests=1, paid=0, message='x')),
           'paid nan': row('k', dict(requests=1, paid=float('nan'), message={})),
           'paid below 0': row('k', dict(requests=1, paid=-5, message={})), 'paid text': row('k', dict(requests=1, paid='x', message={}))}

def state(change):
    def apply(f, base): s = torch.load(f/'checkpoint.pt', weights_only=True); torch.save(change(s, f), f/'checkpoint.pt')
    return apply
STATES = {**{f'no {k}': state(lambda s, f, k=k: {n: v for n, v in s.items() if n != k})
             for k in ('facts', 'adapter', 'opt', 'sched', 'curve')},
          'bomb': state(lambda s, f: s | dict(curve=Bomb(f.parent/'was-here'))), 'a list': state(lambda s, f: [s]),
          'nan': state(lambda s, f: s | dict(adapter={k: v*float('nan') for k, v in s['adapter'].items()})),
          'other shape': state(lambda s, f: s | dict(adapter={k: v[:, :-1] for k, v in s['adapter'].items()})),
          'other names': state(lambda s, f: s | dict(adapter=dict(x=torch.ones(2)))),
          'other facts': state(lambda s, f: s | dict(facts=dict(rank=3, epochs=5))), 'facts text': state(lambda s, f: s | dict(facts='x')),
          'curve text': state(lambda s, f: s | dict(curve=dict(epoch=['x'], train_loss=[1.], val_loss=[1.]))),
          'curve too long': state(lambda s, f: s | dict(curve=dict(epoch=[*range(9)], train_loss=[1.]*9, val_loss=[1.]*9))),
          'curve empty': state(lambda s, f: s | dict(curve={})), 'opt empty': state(lambda s, f: s | dict(opt={}))}
RESULTS = {'score 6': 'diff_id,method,score\nx,DIT,6\n', 'score text': 'diff_id,method,score\nx,DIT,=5\n',
           'score nan text': 'diff_id,method,score\nx,DIT,nan\n', 'score inf': 'diff_id,method,score\nx,DIT,inf\n',
           'score below': 'diff_id,method,score\nx,DIT,-1\n', 'no score': 'diff_id,method\nx,DIT\n',
           'cells beyond': 'diff_id,method,score\nx,DIT,5,9,9\n', 'quote open': 'diff_id,method,score\n"x,DIT,5\n',
           'nul': 'diff_id,method,score\nx\x00,DIT,5\n'}
TABLES = {'cells beyond': 'topic,category\na,b,c\nd,e,f\n', 'quote open': 'topic,category\n"a,b\n',
          'header only': 'topic,category\n', 'blank': 'topic,category\n,\n', 'column missing': 'topic\na\n',
          'column twice': 'topic,topic,category\na,b,c\n', 'spaces': 'topic,category\n \t,x\n', 'nul': 'topic,category\na\x00b,c\n',
          'one cell': 'x', 'ragged': 'topic,category\na,b\nc\n', 'ragged more': 'topic,category\na,b\nc,d,e,f\n'}

def cases():
    "(reader, name of the damage, how to do it)"
    for reader, (_, _, names) in READERS.items():
        for name in names:
            yield from ((reader, f'{name}: {k}', in_file(name, d)) for k, d in ANY.items())
            if not name.endswith(('.pt', '.safetensors')):
                yield from ((reader, f'{name}: {k}', in_file(name, d)) for k, d in ENCODINGS.items())
            yield reader, f'{name}: missing', gone(name)
            yield reader, f'{name}: a folder', folder_instead(name)
    for reader, name in (('bank', 'shard-00001.safetensors'), ('peft', 'adapter_model.safetensors'),
                         ('full', 'model.safetensors'), ('base', 'model.safetensors')):
        yield from ((reader, f'tensors: {k}', tensors(name, d))
                    for k, d in TENSORS.items() if reader not in ('full', 'base') or k != 'rank 0')
    for reader, name in (('peft', 'adapter_model.safetensors'), ('full', 'model.safetensors'), ('base', 'model.safetensors')):
        yield from ((reader, f'header: {k}', header(name, *d)) for k, d in HEADERS.items())
    for reader, some in (('peft', CONFIGS), ('bank', INDEX), ('bank', BANK), ('checkpoint', STATES)):
        yield from ((reader, k, d) for k, d in some.items())
    yield from (('paper', f'content: {k}', pt(D, lambda base, f, c=c: [dict(topic='moss', weight_diff=c(base, f))]*2))
                for k, c in CONTENTS.items())
    yield 'paper', 'file: deflated', deflated
    yield from (('paper', f'file: {k}', pt(D, c)) for k, c in WHOLE.items())
    yield from (('adapter', k, pt('a.pt', c)) for k, c in (CONTENTS | WHOLE).items())
    for reader, name, some in (('paper', 'index.csv', PAPER), ('texts', 'text.jsonl', TEXTS), ('replies', 'c.jsonl', REPLIES),
                               ('results', 'news.csv', RESULTS), ('table', 'labels.csv', TABLES)):
        yield from ((reader, f'{name}: {k}', lines(name, t)) for k, t in some.items())
