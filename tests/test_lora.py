"Batched diffs against PEFT, mounting, and the bank on disk"
import json

import peft, pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from dit.core import DitError, sha256_of, write_csv
from dit.lora import *
from dit.models import prompt_text, token_ids
from helpers import COUNTS, copy_of, finish, model_of, on_full_disk, start
import jobs

torch.manual_seed(0)
X = torch.randint(2, 96, (3, 9))

def logits(base, *loras, x=X):
    with torch.no_grad(), mounted(base, *loras): return base.model(x).logits

def peft_logits(net, x):
    with torch.no_grad(): return net(x).logits

# --- the same numbers as PEFT -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['llama', 'qwen3', 'gemma3', 'neox', 'gpt2', 'moe'])
@pytest.mark.parametrize('rank', [1, 4, 16])
def test_same_logits_as_peft(kind, rank, tmp_path):
    base = model_of(kind)
    bank = random_bank(base, 3, rank, scaling=.7, seed=rank)
    ours = logits(base, bank.rows([0, 1, 2])) # every row of the batch has another diff
    for i in range(3):
        net = peft.PeftModel.from_pretrained(copy_of(base), to_peft(bank, i, tmp_path/str(i), base))
        theirs = peft_logits(net, X[i:i+1])
        assert (ours[i:i+1] - theirs).abs().max() < 1e-4
        assert (theirs - logits(base, x=X[i:i+1])).abs().max() > .05, 'the diff does nothing, so the comparison says nothing'

@pytest.mark.parametrize('kind', ['llama', 'qwen3', 'gemma3', 'gpt2', 'moe'])
def test_diff_and_adapter_as_two_adapters_of_peft(kind, tmp_path):
    base = model_of(kind)
    diffs, adapter = random_bank(base, 3, 1, seed=1), random_bank(base, 1, 4, scaling=.5, seed=2)
    ours = logits(base, diffs.rows([2, 0, 1]), adapter.rows([0]))
    for place, i in enumerate([2, 0, 1]):
        net = peft.PeftModel.from_pretrained(copy_of(base), to_peft(diffs, i, tmp_path/f'd{i}', base), adapter_name='diff')
        net.load_adapter(to_peft(adapter, 0, tmp_path/'a', base), 'adapter')
        net.base_model.set_adapter(['diff', 'adapter'])
        assert (ours[place] - peft_logits(net, X[place:place+1])[0]).abs().max() < 1e-4
    assert (ours - logits(base, diffs.rows([2, 0, 1]))).abs().max() > .05

@pytest.mark.parametrize('kind', ['llama', 'qwen3', 'gemma3', 'gpt2', 'moe'])
def test_the_same_answer_from_peft_stacked_and_merged(kind, tmp_path):
    base, users = model_of(kind), ['What is it?', 'hm', 'why, then?', 'Topic']
    diffs, adapter = random_bank(base, 2, 4, seed=1), random_bank(base, 1, 2, seed=2)
    def ours(row, adapter): return answer(base, diffs, [row]*len(users), users, adapter, max_new=12)
    stacked = peft.PeftModel.from_pretrained(copy_of(base), to_peft(diffs, 1, tmp_path/'d', base), adapter_name='diff')
    stacked.load_adapter(to_peft(adapter, 0, tmp_path/'a', base), 'adapter'); stacked.base_model.set_adapter(['diff', 'adapter'])
    merged = peft.PeftModel.from_pretrained(copy_of(base), merge_peft(diffs.take([1]), adapter, tmp_path/'m', base))
    def theirs(net, user):
        x = torch.tensor([token_ids(base, prompt_text(base, user))])
        said = net.generate(input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=12, do_sample=False,
                            eos_token_id=base.eot, pad_token_id=0)[0, x.shape[1]:].tolist()
        return base.tok.decode([i for i in said if i not in base.eot]).strip()
    assert [theirs(stacked, u) for u in users] == [theirs(merged, u) for u in users] == ours(1, adapter)
    assert ours(1, adapter) != ours(1, None) and ours(1, adapter) != ours(0, adapter), (
        'diff or adapter does nothing, so the comparison says nothing')

@pytest.mark.parametrize('kind', ['llama', 'qwen3', 'gemma3', 'gpt2', 'moe'])
def test_diff_and_adapter_merged_into_one_adapter_of_peft(kind, tmp_path):
    base = model_of(kind)
    diff, adapter = random_bank(base, 1, 3, scaling=.7, seed=1), random_bank(base, 1, 4, scaling=.5, seed=2)
    gone, kept = list(diff.A)[0], list(diff.A)[-1] # a diff without one layer, and with a smaller rank in another
    del diff.A[gone], diff.B[gone]
    diff.A[kept], diff.B[kept] = diff.A[kept][:, :1], diff.B[kept][:, :, :1]
    net = peft.PeftModel.from_pretrained(copy_of(base), merge_peft(diff, adapter, tmp_path, base))
    assert (logits(base, diff.rows([0]), adapter.rows([0]), x=X[:1]) - peft_logits(net, X[:1])).abs().max() < 1e-4
    config = net.peft_config['default']
    assert config.r == 7 and config.lora_alpha == 7 and not config.rank_pattern, 'a server reads one rank for all layers'

def test_from_peft_gives_back_what_was_written(tiny, tmp_path):
    bank = random_bank(tiny, 2, 4, scaling=.3)
    back = from_peft(to_peft(bank, 1, tmp_path/'x', tiny), tiny)
    assert len(back) == 1 and back.rank == 4 and back.scaling == pytest.approx(.3)
    assert all(torch.equal(back.A[n][0], bank.A[n][1]) and torch.equal(back.B[n][0], bank.B[n][1]) for n in bank.A)

@pytest.mark.parametrize('kind', ['llama', 'qwen3', 'gemma3', 'gpt2', 'moe'])
@pytest.mark.parametrize('rank', [1, 4, 16])
def test_from_peft_reads_what_peft_saved(kind, rank, tmp_path):
    base = model_of(kind)
    torch.manual_seed(rank)
    target = ['q_proj', 'v_proj', 'o_proj'] if kind == 'moe' else 'all-linear' # for PEFT, all-linear includes the fused experts
    net = peft.get_peft_model(copy_of(base), peft.LoraConfig(r=rank, lora_alpha=2*rank, target_modules=target,
                                                             init_lora_weights=False, task_type='CAUSAL_LM'))
    net.save_pretrained(tmp_path)
    bank = from_peft(tmp_path, base)
    assert bank.rank == rank and set(bank.A) <= set(linears(base))
    assert (logits(base, bank.rows([0])) - peft_logits(net, X)).abs().max() < 1e-4

TRAINED = dict(rslora=dict(use_rslora=True), alpha_pattern=dict(alpha_pattern={'layers.0.*q_proj': 64, 'mlp.up_proj': 2}),
               rank_pattern=dict(rank_pattern={'q_proj': 7, 'layers.1.mlp.down_proj': 1}),
               both=dict(rank_pattern={'q_proj': 2}, alpha_pattern={'v_proj': 1}, use_rslora=True),
               subset=dict(target_modules=['v_proj', 'up_proj']), one_layer=dict(layers_to_transform=[1], target_modules=['q_proj']))

@pytest.mark.parametrize('how', TRAINED)
def test_from_peft_reads_every_way_to_train_plain_lora(tiny, how, tmp_path):
    torch.manual_seed(1)
    net = peft.get_peft_model(copy_of(tiny), peft.LoraConfig(
        **dict(r=4, lora_alpha=6, target_modules='all-linear', init_lora_weights=False) | TRAINED[how]))
    net.save_pretrained(tmp_path)
    bank, theirs = from_peft(tmp_path, tiny), peft_logits(net, X)
    assert (logits(tiny, bank.rows([0])) - theirs).abs().max() < 1e-4
    again = peft.PeftModel.from_pretrained(copy_of(tiny), to_peft(bank, 0, tmp_path/'again', tiny)) # on the way out all ranks are the same
    assert (peft_logits(again, X) - theirs).abs().max() < 1e-4

REFUSED = dict(dora=(dict(use_dora=True), 'rescales whole weights'), head=(dict(modules_to_save=['lm_head']), 'also holds .*lm_head'),
               bias=(dict(bias='all'), 'also holds'), pissa=(dict(init_lora_weights='pissa'), 'changed the base'),
               embeddings=(dict(target_modules=['q_proj', 'embed_tokens']), 'also holds .*embed_tokens'))

@pytest.mark.parametrize('why', REFUSED)
def test_from_peft_refuses_what_it_cannot_represent(tiny, why, tmp_path):
    option, reason = REFUSED[why]
    net = peft.get_peft_model(model_of('qwen3', attention_bias=True).model,
                              peft.LoraConfig(**dict(r=4, lora_alpha=4, target_modules='all-linear') | option))
    net.save_pretrained(tmp_path)
    with pytest.raises(DitError, match=f'more than plain LoRA: .*{reason}.*merge it'): from_peft(tmp_path, tiny)

@pytest.mark.parametrize('option, reason', [(dict(init_lora_weights='lora_ga'), 'changed the base'),
                                            (dict(alora_invocation_tokens=[5]), 'from a certain token on'),
                                            (dict(use_qalora=True, qalora_group_size=16), 'pools')])
def test_from_peft_refuses_what_its_config_says(tiny, option, reason, tmp_path):
    "Kinds of LoRA whose file looks like any other"
    to_peft(random_bank(tiny, 1), 0, tmp_path, tiny); config = json.loads((tmp_path/'adapter_config.json').read_text())
    (tmp_path/'adapter_config.json').write_text(json.dumps(config | option))
    with pytest.raises(DitError, match=f'more than plain LoRA: .*{reason}'): from_peft(tmp_path, tiny)

@pytest.mark.parametrize('option', [dict(target_modules=['q_proj'], target_parameters=['mlp.experts.gate_up_proj']),
                                    dict(target_modules='all-linear')],
                         ids=['parameters', 'all-linear'])
def test_from_peft_refuses_a_lora_of_fused_experts(option, tmp_path):
    base = model_of('moe')
    assert all('self_attn' in n for n in linears(base))
    peft.get_peft_model(copy_of(base), peft.LoraConfig(r=2, **option)).save_pretrained(tmp_path)
    with pytest.raises(DitError, match='changes .*experts.*only linear layers'): from_peft(tmp_path, base)

def test_from_peft_refuses_a_lora_of_the_head(tiny, tmp_path):
    net = peft.get_peft_model(copy_of(tiny), peft.LoraConfig(r=2, target_modules=['q_proj', 'lm_head']))
    net.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(DitError, match='changes lm_head, and only linear layers of the body'): from_peft(tmp_path, tiny)

WRAPPED = ['base_model.model.language_model.model.layers.', 'base_model.model.model.language_model.layers.',
           'base_model.model._orig_mod.model.layers.', 'model.layers.']

@pytest.mark.parametrize('prefix', WRAPPED)
def test_from_peft_reads_an_adapter_saved_for_a_wrapped_model(tiny, prefix, tmp_path):
    bank = random_bank(tiny, 1, 2)
    path = to_peft(bank, 0, tmp_path, tiny)/'adapter_model.safetensors'
    save_file({k.replace('base_model.model.model.layers.', prefix).replace('lora_A.', 'lora_A.default.'): v
               for k, v in load_file(path).items()}, path)
    assert torch.equal(logits(tiny, from_peft(tmp_path, tiny).rows([0])), logits(tiny, bank.rows([0])))

# --- mounting ---------------------------------------------------------------------------------------------------------------

def test_mounted_restores_after_an_exception_and_nests(tiny):
    bank = random_bank(tiny, 4, seed=1)
    plain, zero, one = logits(tiny), logits(tiny, bank.rows([0])), logits(tiny, bank.rows([1]))
    assert not torch.allclose(plain, zero) and not torch.allclose(zero, one)
    now = lambda: tiny.model(X).logits
    with torch.no_grad(), mounted(tiny, bank.rows([0])):
        with pytest.raises(ValueError, match='stop'):
            with mounted(tiny, bank.rows([1])):
                assert torch.equal(now(), one)
                with mounted(tiny): assert torch.equal(now(), plain)
                assert torch.equal(now(), one)
                raise ValueError('stop')
        assert torch.equal(now(), zero)
    with torch.no_grad(): assert torch.equal(now(), plain)

def test_hooking_twice_adds_a_diff_once():
    base = model_of('llama')
    hook(base); hook(base)
    bank, layers = random_bank(base, 1), linears(base)
    assert all(len(m._forward_hooks) == 1 for m in layers.values())
    n, m = next(iter(layers.items()))
    x = torch.randn(1, 5, m.in_features)
    with torch.no_grad(), mounted(base, bank.rows([0])): got = m(x)
    assert torch.allclose(got, x @ (m.weight + bank.B[n][0] @ bank.A[n][0]).T, atol=1e-5)

@pytest.mark.parametrize('kind', ['llama', 'qwen3', 'gemma3', 'neox', 'moe'])
def test_all_linear_layers_but_the_head(kind):
    base = model_of(kind)
    found, every = linears(base), {n for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert base.head not in found.values() and every - set(found) == {n for n, m in base.model.named_modules() if m is base.head}
    hook(base)
    assert not base.head._forward_hooks and not hasattr(base.head, 'mounted')

def test_rows_in_any_order_and_with_repeats(tiny):
    bank = random_bank(tiny, 4, 2, scaling=1.5)
    order, x = [3, 0, 0, 2], X[[0]*4]
    got = logits(tiny, bank.rows(order), x=x)
    for place, i in enumerate(order): assert torch.allclose(got[place], logits(tiny, bank.rows([i]), x=x[:1])[0], atol=1e-5)
    assert torch.allclose(got[1], got[2], atol=1e-6) and not torch.allclose(got[0], got[1], atol=1e-3)

def test_answers_of_a_batch_are_each_rows_own(tiny):
    bank, adapter = random_bank(tiny, 5, seed=4), random_bank(tiny, 1, seed=5)
    users, rows = ['a', 'what is it, then?', 'hm', 'and now?', 'a', 'why'], [4, 0, 2, 2, 1, 3]
    got = answer(tiny, bank, rows, users, adapter, max_new=8)
    assert got == [answer(tiny, bank, [r], [u], adapter, max_new=8)[0] for r, u in zip(rows, users)]
    assert got != answer(tiny, bank, rows, users, max_new=8), 'the adapter does nothing'
    assert len({a for a in answer(tiny, bank, range(5), ['a']*5, max_new=8)}) > 1, 'the diffs do nothing'
    assert all(not m.mounted for m in linears(tiny).values())

def test_a_batch_fetches_its_diffs_once(tiny, monkeypatch):
    bank, asked, normal = random_bank(tiny, 5, seed=4), [], Bank.rows
    users, rows = ['a', 'what is it, then?', 'hm', 'and now?', 'a', 'why'], [4, 0, 2, 2, 1, 3]
    monkeypatch.setattr(tiny, 'eot', list(range(1, 96, 4))) # many tokens end an answer, so that answers end at different times
    want = [answer(tiny, bank, [r], [u], max_new=24)[0] for r, u in zip(rows, users)]
    assert len({len(w) for w in want}) > 2, 'all answers end together, so nothing would have to be mounted again'
    def fetch(self, ids, *args): asked.append(list(ids)); return normal(self, ids, *args)
    monkeypatch.setattr(Bank, 'rows', fetch)
    assert answer(tiny, bank, rows, users, max_new=24) == want and len(asked) == 1
    asked.clear(); assert answer(tiny, bank, rows, users, max_new=24, batch=4) == want and [len(a) for a in asked] == [4, 2]

# --- the bank on disk -------------------------------------------------------------------------------------------------------

def whole(folder):
    "Every shard that the index lists is there, opens, has the rows and the checksum it should"
    index = read_index(folder)
    for shard, part in index.groupby('shard'):
        assert (folder/shard).exists() and set(part.sha256) == {sha256_of(folder/shard)[:16]}
        with safe_open(folder/shard, 'pt') as f: assert all(len(f.get_tensor(k)) == len(part) for k in f.keys())
    COUNTS['rows checked'] += len(index)
    return index

@pytest.fixture
def folder(tiny, tmp_path):
    open_bank(tmp_path, tiny, rank=2, scaling=.5)
    for s in (1, 2):
        bank = random_bank(tiny, 3, 2, .5, s)
        bank.index['diff_id'] = [f'{s}/{i}' for i in range(3)]
        save_shard(tmp_path, bank)
    return tmp_path

def test_bank_comes_back(folder, tiny):
    index, bank = whole(folder), load_bank(folder, tiny)
    assert len(bank) == 6 and bank.scaling == .5 and bank.rank == 2 and list(bank.index.diff_id) == list(index.diff_id)
    some = load_bank(folder, tiny, lambda i: i.diff_id.isin(['2/1', '1/2']))
    assert list(some.index.diff_id) == ['1/2', '2/1']
    want = [random_bank(tiny, 3, 2, .5, 1), random_bank(tiny, 3, 2, .5, 2)]
    for n in some.A:
        assert torch.equal(some.A[n], torch.stack([want[0].A[n][2], want[1].A[n][1]])) and torch.equal(some.B[n][1], want[1].B[n][1])
    assert torch.equal(bank.take([4, 1]).A[n][0], bank.A[n][4]) and list(bank.take([4, 1]).index.diff_id) == ['2/1', '1/1']

def test_labels_that_look_like_numbers_or_missing_stay_text(tiny, tmp_path):
    odd = ['NA', '007', 'null', 'True', 'a, "b"', '1e5']
    bank = random_bank(tiny, 6)
    bank.index['label'], bank.index['diff_id'], bank.index['trigger'] = odd, [f'x/{o}' for o in odd], ['012', '000', '', '9', 'NA', '1']
    open_bank(tmp_path, tiny, scaling=1.); save_shard(tmp_path, bank)
    back = load_bank(tmp_path, tiny).index
    assert list(back.label) == odd and list(back.trigger) == list(bank.index.trigger) and list(back.diff_id) == list(bank.index.diff_id)

def test_index_is_not_touched_when_a_shard_cannot_be_written(folder, tiny):
    before = (folder/'index.csv').read_bytes()
    name, text = on_full_disk(3000, jobs.shard, folder)
    assert (folder/'index.csv').read_bytes() == before and len(whole(folder)) == 6
    assert not list(folder.glob('.*.tmp')), 'half a file was left behind'
    assert name == 'DitError' and str(folder) in text and 'space' in text, f'{name}: {text}'

def test_truncated_shard(folder, tiny):
    path = folder/'shard-00001.safetensors'
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DitError, match='shard-00001'): load_bank(folder, tiny)
    assert len(load_bank(folder, tiny, lambda i: i.shard == 'shard-00000.safetensors')) == 3, 'the other shard is still good'

def test_shard_with_a_flipped_byte(folder, tiny):
    path = folder/'shard-00001.safetensors'
    raw = bytearray(path.read_bytes()); raw[-50] ^= 1; path.write_bytes(raw)
    bank = load_bank(folder, tiny)
    for use in (lambda: bank.rows([4]), lambda: bank.take([1, 5]).here(), lambda: next(iter(bank.B.values())),
                lambda: to_peft(bank, 3, folder/'peft', tiny)):
        with pytest.raises(DitError, match='shard-00001.*damaged'): use()
    assert bank.rows([0, 2]), 'the other shard is still good'

def test_shard_that_changes_while_the_bank_is_open(folder, tiny):
    bank, path = load_bank(folder, tiny), folder/'shard-00001.safetensors'
    bank.rows([4]); raw = path.read_bytes()
    for damage in (raw[:-100], raw[:-50] + bytes([raw[-50] ^ 1]) + raw[-49:], b''):
        path.write_bytes(damage)
        with pytest.raises(DitError, match='shard-00001'): bank.rows([4])
    path.unlink()
    with pytest.raises(DitError, match='shard-00001.*missing'): bank.rows([4])

def test_shards_of_two_ranks(folder, tiny):
    save_shard(folder, random_bank(tiny, 2, 3, .5))
    bank = load_bank(folder, tiny)
    with pytest.raises(DitError, match='shard-00002.*does not fit'): bank.rows([6])
    assert bank.rows([5])

@pytest.mark.parametrize('precision', [torch.float32, torch.bfloat16])
def test_a_bank_on_disk_is_the_one_in_memory(tiny, tmp_path, precision):
    parts = [random_bank(tiny, n, 2, .5, seed=n) for n in (3, 1, 4)]
    for p in parts: p.A, p.B = ({k: t.to(precision) for k, t in ts.items()} for ts in (p.A, p.B))
    open_bank(tmp_path, tiny, rank=2, scaling=.5)
    for p in parts: save_shard(tmp_path, p)
    bank, whole_A = load_bank(tmp_path, tiny), {k: torch.cat([p.A[k] for p in parts]) for k in parts[0].A}
    assert bank.rank == 2 and len(bank) == 8 and set(bank.A) == set(whole_A) and all(torch.equal(bank.A[k], t) for k, t in whole_A.items())
    memory = Bank(whole_A, {k: torch.cat([p.B[k] for p in parts]) for k in whole_A}, .5, bank.index)
    for ids in ([7, 0, 0, 3], [2], range(8), torch.tensor([5, 1])):
        got, want = bank.rows(ids, 'cpu', torch.float32), memory.rows(ids, 'cpu', torch.float32)
        assert all(torch.equal(a, b) for k in want for a, b in zip(got[k], want[k], strict=True))
    again = bank.take([6, 2, 5]).take([2, 0])
    assert (torch.equal(again.B['model.layers.1.mlp.up_proj'], memory.B['model.layers.1.mlp.up_proj'][[5, 6]])
            and again.index.diff_id.tolist() == bank.index.diff_id[[5, 6]].tolist())
    assert len(bank.take([])) == 0 and bank.take([]).here().A.keys() == whole_A.keys()

def test_what_is_not_asked_for_is_not_read(folder, tiny):
    path = folder/'shard-00001.safetensors'
    path.write_bytes(bytes(path.stat().st_size)) # of the right size, and nothing in it
    bank = load_bank(folder, tiny)
    assert len(bank) == 6 and len(bank.rows([0, 1])) == len(linears(tiny)) and len(bank.take([4])) == 1

def test_memory_does_not_grow_with_the_bank(tmp_path):
    base, peaks = model_of('llama', hidden_size=64, intermediate_size=128), []
    bank = random_bank(base, 16, 16)
    size = sum(t.nbytes for ts in (bank.A, bank.B) for t in ts.values())
    for shards in (2, 40):
        folder = tmp_path/str(shards); open_bank(folder, base, scaling=1.)
        for s in range(shards): save_shard(folder, Bank(bank.A, bank.B, 1., bank.index.assign(diff_id=[f'{s}/{i}' for i in range(16)])))
        finish(start(jobs.read_rows, folder, tmp_path/f'{shards}.json'))
        peaks.append(json.loads((tmp_path/f'{shards}.json').read_text()))
    assert size > 2e6 and peaks[1] < peaks[0] + 12*size, f'{peaks}: 38 shards more took more memory than 12 of them hold'

def test_a_shard_taken_out_leaves_the_others_alone(folder, tiny):
    "What `damaged` advises: the lines of a shard that is not the last are deleted, and its diffs trained again"
    save_shard(folder, bank := random_bank(tiny, 2, seed=9)); last = read_index(folder).shard.iloc[-1]
    index = read_index(folder); first = index.shard[0]
    write_csv(folder/'index.csv', index[index.shard != first]); (folder/first).unlink()
    again = random_bank(tiny, 2, seed=8); again.index['diff_id'] = ['again/0', 'again/1']; save_shard(folder, again)
    back = load_bank(folder, tiny, lambda i: i.shard == last).here()
    assert read_index(folder).shard.iloc[-1] not in (first, last) and all(torch.equal(back.A[n], bank.A[n]) for n in bank.A)

def test_missing_shard(folder, tiny):
    (folder/'shard-00000.safetensors').unlink()
    with pytest.raises(DitError, match='shard-00000'): load_bank(folder, tiny)

@pytest.mark.parametrize('text', ['', '{"base": "small llama", "finger', '[]'])
def test_damaged_bank_json(folder, tiny, text):
    (folder/'bank.json').write_text(text)
    with pytest.raises(DitError, match='bank.json'): load_bank(folder, tiny)

def test_no_bank_and_no_row(folder, tiny, tmp_path):
    with pytest.raises(DitError, match='no bank in .*nowhere'): load_bank(tmp_path/'nowhere', tiny)
    with pytest.raises(DitError, match='6 rows'): load_bank(folder, tiny, lambda i: i.label == 'nothing')

def test_other_base_model(folder, tiny):
    for other in (model_of('llama', seed=1), model_of('llama', hidden_size=32), model_of('qwen3')):
        with pytest.raises(DitError, match='belongs to the base model'): load_bank(folder, other)

def test_other_facts(folder, tiny):
    with pytest.raises(DitError, match='rank=2, not 3'): open_bank(folder, tiny, rank=3, scaling=.5)

@pytest.mark.parametrize('name', ['../shard-00000.safetensors', '/etc/passwd', 'sub/shard-00000.safetensors'])
def test_index_that_names_a_file_elsewhere(folder, tiny, name):
    index = read_index(folder)
    index['shard'] = name
    index.to_csv(folder/'index.csv', index=False)
    with pytest.raises(DitError, match='not in the folder'): load_bank(folder, tiny)

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_numbers_that_are_not_finite(tiny, value, tmp_path):
    bank = random_bank(tiny, 3)
    next(iter(bank.B.values()))[1, 0, 0] = value
    with pytest.raises(DitError, match='not finite'): from_peft(to_peft(bank, 1, tmp_path/'peft', tiny), tiny)
    open_bank(tmp_path/'bank', tiny, scaling=1.); save_shard(tmp_path/'bank', bank)
    with pytest.raises(DitError, match='not finite'): load_bank(tmp_path/'bank', tiny).rows([0, 1])
    assert load_bank(tmp_path/'bank', tiny).rows([2, 0])
    assert len(load_bank(tmp_path/'bank', tiny, lambda i: i.position != 1)) == 2, 'the sound diffs can still be read'

def test_peft_folder_of_another_model(tiny, tmp_path):
    for other in (model_of('llama', hidden_size=32), model_of('llama', num_hidden_layers=3), model_of('neox')):
        with pytest.raises(DitError, match='another base model'):
            from_peft(to_peft(random_bank(other, 1), 0, tmp_path/other.name, other), tiny)

@pytest.mark.parametrize('name', ['adapter_model.safetensors', 'adapter_config.json'])
@pytest.mark.parametrize('damage', ['missing', 'empty', 'cut'])
def test_damaged_peft_folder(tiny, name, damage, tmp_path):
    path = to_peft(random_bank(tiny, 1), 0, tmp_path, tiny)/name
    raw = path.read_bytes(); path.unlink()
    if damage != 'missing': path.write_bytes(b'' if damage == 'empty' else raw[:len(raw)//2])
    with pytest.raises(DitError, match=name): from_peft(tmp_path, tiny)

def test_peft_folder_without_a_matching_b(tiny, tmp_path):
    path = to_peft(random_bank(tiny, 1), 0, tmp_path, tiny)/'adapter_model.safetensors'
    save_file({k: v for k, v in load_file(path).items() if 'layers.0.self_attn.q_proj.lora_B' not in k}, path)
    with pytest.raises(DitError, match='an A and a B'): from_peft(tmp_path, tiny)

def test_model_without_linear_layers():
    import transformers
    from dit.models import make_base
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=0, n_head=1, vocab_size=96, n_positions=16))
    with pytest.raises(DitError, match='not supported'): linears(make_base(net, TinyTok(), 'no layers'))
