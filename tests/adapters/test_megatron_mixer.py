"""What Megatron's mixer slot is given: refusals, layouts, first weights, inference, and the groups behind it."""

import dataclasses
import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from mamba2_dist import ParallelGroups

from ..distributed import run_ranks
from ..tolerances import MODEL, RELATIVE, assert_close
from .megatron_on_cpu import initialize, megatron_on_cpu
from .megatron_run import Run, build, draw, packed_params, small_config

core = pytest.importorskip("megatron.core", reason="needs megatron-core")

from mamba2_dist.adapters.megatron.layout import _packed  # noqa: E402

FLOAT32 = RELATIVE[torch.float32]


def _refusal(run, changes, mixer):
    """The message with which a model is refused."""
    with megatron_on_cpu():
        initialize(run.tp, run.pp, run.cp)
        config = small_config(run)
        for name, value in changes.items():
            setattr(config, name, value)
        with pytest.raises(ValueError) as refused:
            build(dataclasses.replace(run, spec=mixer), config)
    return str(refused.value)


REFUSED = [
    ({"fp8": "hybrid"}, {}, "fp8 (hybrid) is not supported by this Mamba-2 mixer; its projections"),
    ({"fp4": "e2m1"}, {}, "fp4 (e2m1) is not supported"),
    ({"tp_comm_overlap": True}, {}, "tp_comm_overlap (True) is not supported by this Mamba-2 mixer; its collectives"),
    ({"delay_wgrad_compute": True}, {}, "delay_wgrad_compute (True) is not supported"),
    ({"cpu_offloading": True}, {}, "cpu_offloading (True) is not supported by this Mamba-2 mixer; set cpu_off"),
    ({"fine_grained_activation_offloading": True}, {}, "leave it off and give recompute='inner'"),
    ({"init_model_with_meta_device": True}, {}, "init_model_with_meta_device (True)"),
    ({"mamba_training_ssm_states_dtype": torch.bfloat16}, {}, "leave it empty: states are float32"),
    ({"use_mamba_mem_eff_path": False}, {}, "use_mamba_mem_eff_path (False) is not supported"),
    (
        {"cuda_graph_impl": "local", "cuda_graph_scope": [], "cuda_graph_modules": []},
        {},
        "would capture Mamba-2 layers",
    ),
    ({"mamba_num_heads": 7, "mamba_num_groups": 1}, {}, "nheads (7) must be divisible by tp (2)"),
    ({"mamba_num_groups": 3}, {}, "nheads (8) must be divisible by ngroups (3)"),
    ({"normalization": "L2Norm"}, {}, "normalization (L2Norm) must be RMSNorm or LayerNorm"),
    ({"attention_dropout": 0.1}, {}, "attention_dropout (0.1) needs TransformerEngine"),
    ({"window_size": (8, 0)}, {}, "window_size ((8, 0)) needs TransformerEngine"),
    ({"qk_layernorm": True}, {}, "qk_layernorm (True) needs TransformerEngine"),
    ({"moe_grouped_gemm": True}, {}, "moe_grouped_gemm (True) needs TransformerEngine"),
    ({}, {"rmsnorm": False}, "rmsnorm (False) is not supported"),
    ({}, {"bias": True}, "bias (True) is not supported"),
    ({}, {"conv_bias": False}, "conv_bias (False) is not supported"),
    ({}, {"dt_init": "constant"}, "dt_init (constant) must be 'random'"),
    ({}, {"headdim": 64}, "this Mamba-2 mixer does not know headdim"),
    ({}, {"layout": "striped"}, "layout"),
    ({}, {"recompute": "all"}, "recompute"),
    ({}, {"state_scan": "bus"}, "state_scan"),
]


def _refusals():
    run = Run(tp=2)
    return [_refusal(run, changes, mixer) for changes, mixer, _ in REFUSED]


def test_what_is_not_supported_is_refused():
    for found in run_ranks(2, _refusals):
        for message, (changes, mixer, expected) in zip(found, REFUSED, strict=True):
            assert expected in message, (changes, mixer)


def _late_refusals():
    """Messages at the first batch, over two ranks of cp."""
    messages = {}

    def refused(name, call):
        with pytest.raises(ValueError) as error:
            call()
        messages[name] = str(error.value)

    run = Run(cp=2)
    with megatron_on_cpu():
        initialize(1, 1, 2)
        model = build(run, small_config(run))
        mixer, hidden = model.decoder.layers[0].mixer, torch.randn(16, 1, 64)
        context = SimpleNamespace(is_static_batching=lambda: True, sequence_len_offset=0, key_value_memory_dict={})
        packed = packed_params(dataclasses.replace(run, documents=(0, 6, 32)))
        beyond = packed_params(dataclasses.replace(run, documents=(0, 64)))
        moving = packed_params(dataclasses.replace(run, documents=(0, 32)))
        moving.local_cp_size = 1
        square = packed_params(dataclasses.replace(run, documents=(0, 32)))
        square.qkv_format = "sbhd"
        refused("inference", lambda: mixer(hidden, inference_context=context))
        refused("documents", lambda: mixer(hidden, packed_seq_params=packed))
        refused("beyond", lambda: mixer(hidden, packed_seq_params=beyond))
        refused("dynamic", lambda: mixer(hidden, packed_seq_params=moving))
        refused("format", lambda: mixer(hidden, packed_seq_params=square))
        refused("batch", lambda: mixer(torch.randn(8, 2, 64), packed_seq_params=packed))
        refused("odd", lambda: mixer(torch.randn(7, 1, 64)))
        own = build(dataclasses.replace(run, spec={"layout": "contiguous"}), small_config(run))
        rotary = torch.zeros(16, 1, 1, 16)
        config = small_config(run)
        config.cp_comm_type = "a2a+p2p"
        refused("cp_comm_type", lambda: build(run, config))
        further = small_config(run)
        further.mtp_num_layers = 1
        refused("further tokens", lambda: build(dataclasses.replace(run, spec={"layout": "contiguous"}), further))
        refused("rotary", lambda: own.decoder(hidden, None, rotary_pos_emb=rotary))
    return messages


def test_what_a_batch_cannot_be_is_refused():
    expected = {
        "inference": "inference needs cp 1, got 2; load the checkpoint with cp 1",
        "documents": "the document at token 0 has 6 tokens, which must be divisible by 2 cp (4)",
        "beyond": "cu_seqlens end at token 64, the ranks of cp hold 32",
        "dynamic": "packed_seq_params asks for a cp of its own (1 ranks), the layer's cp has 2",
        "format": "packed_seq_params.qkv_format must be 'thd' where there are cu_seqlens, got 'sbhd'",
        "batch": "packed documents must come in one row, (tokens, 1, hidden_size), got a batch of 2",
        "odd": "a sequence has 14 tokens, which must be divisible by 2 cp (4)",
        "cp_comm_type": "cp_comm_type (a2a+p2p) needs TransformerEngine",
        "further tokens": "layout (contiguous) is not the one that layers for several tokens of Megatron's work with",
        "rotary": "rotary embeddings come as Megatron cuts sequences over cp; leave layout at 'megatron'",
    }
    for messages in run_ranks(2, _late_refusals):
        for name, text in expected.items():
            assert text in messages[name]


def _one_rank_refusals():
    messages = []
    from mamba2_dist.adapters.megatron import hybrid_model

    dynamic = SimpleNamespace(is_static_batching=lambda: False)
    with megatron_on_cpu():
        initialize(1, 1, 1)
        run = Run()
        mixer = build(run, small_config(run)).decoder.layers[0].mixer
        for call in (
            lambda: mixer(torch.randn(4, 1, 64), inference_context=dynamic),
            lambda: build(dataclasses.replace(run, pattern="M*"), small_config(run)),
            lambda: hybrid_model(small_config(run), run.pattern, vp_stage=0),
        ):
            with pytest.raises(ValueError) as error:
                call()
            messages.append(str(error.value))
    return messages


def test_what_one_rank_cannot_do_is_refused():
    (messages,) = run_ranks(1, _one_rank_refusals)
    assert "inference with dynamic batching is not supported" in messages[0]
    assert "num_layers (4) must be the number of layers in the pattern (2)" in messages[1]
    assert "pre_process and post_process must be given with vp_stage" in messages[2]


def _generated():
    """The logits of a sequence at once, and of its first tokens and then one at a time."""
    from megatron.core.inference.contexts import StaticInferenceContext

    run = Run()
    with megatron_on_cpu(), torch.no_grad():
        initialize(1, 1, 1)
        torch.manual_seed(1)
        model = build(run, small_config(run)).eval()
        tokens = torch.randint(64, (2, 12))
        places = torch.arange(12)[None].expand(2, -1)
        context = StaticInferenceContext(2, 12)
        context.materialize_only_last_token_logits = False
        pieces = []
        for start, end in [(0, 7), *((i, i + 1) for i in range(7, 12))]:
            part = slice(start, end)
            options = {"inference_context": context, "runtime_gather_output": True}
            pieces.append(model(tokens[:, part], places[:, part], None, **options))
            context.sequence_len_offset = end
        return model(tokens, places, None), torch.cat(pieces, dim=1)


def test_inference_goes_on_token_by_token():
    ((whole, pieces),) = run_ranks(1, _generated)
    # 0.17 gives the logits of the last token of a call alone
    known = 6 if core.__version__.startswith("0.17") else 12
    assert_close(pieces, whole[:, -known:], FLOAT32)


def _first_weights(tp):
    """Every tensor of a new mixer as a checkpoint would hold it, from this rank."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    run = Run(tp=tp, ngroups=1, pattern="MM")
    with megatron_on_cpu():
        initialize(tp, 1, 1)
        torch.manual_seed(7)
        state = build(run, small_config(run)).decoder.layers[1].mixer.sharded_state_dict()
        apply_factories(state)
    return {each.key: (each.data.detach().clone(), each.global_offset) for each in nested_values(state)}


def test_first_weights_do_not_depend_on_tp():
    (whole,) = run_ranks(1, _first_weights, 1)
    split = run_ranks(2, _first_weights, 2)
    for shards in split:
        assert shards.keys() == whole.keys()
        for key, (shard, offset) in shards.items():
            place = tuple(slice(o, o + n) for o, n in zip(offset, shard.shape, strict=True))
            assert torch.equal(whole[key][0][place], shard), key
    assert split[0]["in_proj.weight.z"][0].std() > 0


def _not_drawn():
    with megatron_on_cpu():
        initialize(1, 1, 1)
        config = small_config(Run())
        config.perform_initialization = False
        return dict(build(Run(), config).decoder.layers[0].mixer.state_dict())


def test_without_initialization_only_projections_are_left_out():
    (weights,) = run_ranks(1, _not_drawn)
    assert not weights["in_proj.weight"].any()
    assert all(weights[name].any() for name in ("A_log", "dt_bias", "D", "conv1d.weight", "norm.weight"))


def _tables_of_one_description():
    from mamba2_dist.adapters.megatron import segment_table

    packed = packed_params(Run(documents=(0, 8, 20, 32)))
    with megatron_on_cpu():
        first, same = (segment_table(32, 1, dist.group.WORLD, packed) for _ in range(2))
    packed.cu_seqlens_q[1] = 10
    changed = segment_table(32, 1, dist.group.WORLD, packed)
    return first is same, first.documents, changed.documents


def test_a_table_is_kept_until_its_offsets_change():
    assert run_ranks(1, _tables_of_one_description) == [(True, ((0, 8, 20, 32),), ((0, 10, 20, 32),))]


def _marks():
    with megatron_on_cpu():
        initialize(2, 1, 1)
        run = Run(tp=2, ngroups=1)
        mixer = build(run, small_config(run)).decoder.layers[0].mixer
        return {
            name: (p.tensor_model_parallel, p.partition_dim, getattr(p, "partition_sizes", None), p.shared)
            for name, p in mixer.named_parameters()
        }


def test_parameters_say_what_optimizers_ask():
    marks = run_ranks(2, _marks)
    alone, shared = "in_proj.parametrizations.weight.original0", "in_proj.parametrizations.weight.original1"
    assert [each[alone] for each in marks] == 2 * [(True, 0, [64, 64, 4], False)]
    assert [each[shared] for each in marks] == [(True, 0, [16, 16], False), (True, 0, [16, 16], True)]
    assert marks[0]["out_proj.weight"] == (True, 1, None, False)
    assert all(mark[0] for each in marks for mark in each.values())


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.sampled_from([2, 3, 4]))
def test_packed_documents_are_cut_as_megatron_cuts_them(lengths, cp):
    offsets = [0, *torch.tensor(lengths).mul(2 * cp).cumsum(0).tolist()]
    seqlen = offsets[-1] + 2 * cp  # tokens behind the last document
    table = _packed(offsets, seqlen, cp, "megatron")
    for rank in range(cp):
        runs = []
        for start, end in zip([*offsets], [*offsets[1:], seqlen], strict=True):
            parts = torch.arange(start, end).chunk(2 * cp) if end > start else ()
            runs += [parts[rank], parts[-1 - rank]] if parts else []
        assert table.positions(rank).tolist() == torch.cat(runs).tolist()


def _groups_over_uneven_ranks():
    # groups that one rank has made more than another
    if dist.get_rank() == 1:
        dist.new_group([1], use_local_synchronization=True)
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    columns = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    groups = ParallelGroups.over(pairs[dist.get_rank() // 2], columns[dist.get_rank() % 2], node_size=2)
    return groups.tp.ranks, groups.cp.ranks, groups.states.ranks, groups.states.nodes, groups.tp_part(1).ranks


def test_groups_are_made_by_those_who_need_them():
    found = run_ranks(4, _groups_over_uneven_ranks)
    assert found[1] == ((0, 1), (1, 3), (1, 3), 2, (1,))
    assert found[2] == ((2, 3), (0, 2), (0, 2), 2, (2,))


def _halves_of_tp():
    if dist.get_rank() == 2:
        dist.new_group([2], use_local_synchronization=True)
    alone = [dist.new_group([rank]) for rank in range(4)][dist.get_rank()]
    world = dist.new_group(range(4))
    part = ParallelGroups.over(world, alone).tp_part(2)
    total = torch.tensor([2.0 ** dist.get_rank()])
    dist.all_reduce(total, group=part.handle)
    return total.item()


def test_parts_of_tp_are_made_by_those_who_need_them():
    assert run_ranks(4, _halves_of_tp) == [3.0, 3.0, 12.0, 12.0]


def _packed_and_alone():
    """Losses of a packed row and of its documents one by one, and the gradients of both."""
    run = Run(documents=(0, 8, 20, 32), ngroups=1)
    found = []
    with megatron_on_cpu():
        initialize(1, 1, 1)
        model = build(run, small_config(run))
        draw(model)
        device = next(model.parameters()).device
        tokens = torch.randint(64, (1, 33), generator=torch.Generator().manual_seed(3)).to(device)
        places = torch.arange(32, device=device)[None]
        alone = [(pair, None) for pair in itertools.pairwise(run.documents)]
        for batches in [((0, 32), packed_params(run, device))], alone:
            model.zero_grad()
            losses = []
            for (start, end), packed in batches:
                here = slice(start, end)
                labels = tokens[:, 1:][:, here]
                losses.append(model(tokens[:, here], places[:, here], None, labels=labels, packed_seq_params=packed))
                losses[-1].sum().backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            found.append((torch.cat(losses, dim=1).detach().cpu(), gradient.cpu()))
    return found


def test_packed_documents_do_not_see_each_other(device):
    ((packed, alone),) = run_ranks(1, _packed_and_alone, device=device.type)
    for ours, expected in zip(packed, alone, strict=True):
        assert_close(ours, expected, MODEL[torch.float32])


def _losses(tp, dtype):
    """Of this rank's share of the vocabulary, by the model and by Megatron's class: losses, and the gradient."""
    with megatron_on_cpu():
        initialize(tp, 1, 1)
        run = Run(tp=tp)
        model = build(run, small_config(run))
        device = next(model.parameters()).device
        random = torch.Generator().manual_seed(3)
        logits = 4 * torch.randn(6, 2, 64, generator=random).chunk(tp, dim=-1)[dist.get_rank()]
        labels, weights = torch.randint(64, (2, 6), generator=random).to(device), torch.arange(12).view(2, 6).to(device)
        found = []
        for loss in (model.compute_language_model_loss, super(type(model), model).compute_language_model_loss):
            # Megatron's overwrites its logits
            own = logits.to(device, dtype, copy=True).requires_grad_()
            losses = loss(labels, own)
            (gradient,) = torch.autograd.grad(losses, own, weights.float())
            found.append((losses.detach().cpu(), gradient.detach().cpu()))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_megatron(device, dtype):
    tp = 2 if device.type == "cpu" else 1
    for ours, expected in run_ranks(tp, _losses, tp, dtype, device=device.type):
        assert ours[1].dtype == expected[1].dtype == dtype
        assert_close(ours[0], expected[0], FLOAT32)
        assert_close(ours[1], expected[1], RELATIVE[dtype])


def _asked_for_fusion():
    from megatron.core.models.common.language_module.language_module import LanguageModule

    with megatron_on_cpu(), mock.patch.object(LanguageModule, "compute_language_model_loss") as loss:
        initialize(1, 1, 1)
        run = Run(config={"cross_entropy_loss_fusion": True})
        return build(run, small_config(run)).compute_language_model_loss(None, None) is loss.return_value


def test_a_fused_loss_is_that_of_megatron():
    assert run_ranks(1, _asked_for_fusion) == [True]
