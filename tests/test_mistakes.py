"""Every mistake of a user is refused at the door, in one line, with field, value, rule and remedy."""

import gzip
import json
import sys

import pytest
import torch
import yaml
from mamba2_dist.kernels.conv1d import causal_conv1d, causal_conv1d_split
from mamba2_dist.kernels.norm import add_rmsnorm, gated_rmsnorm
from mamba2_dist.kernels.ssd import mamba_chunk_scan_combined
from tokenizers import Tokenizer, models

from mamba2_dist import (
    AttentionConfig,
    HybridConfig,
    HybridModel,
    Mamba2Config,
    Mamba2Mixer,
    ParallelConfig,
    ParallelGroups,
)
from mamba2_dist.cli import main
from mamba2_dist.config import MLPConfig

from .train.corpus import write_texts

CONFIG = {
    "model": {"pattern": "M*-", "d_model": 64, "vocab_size": 320},
    "data": {"seqlen": 32},
    "steps": 4,
    "schedule": {"warmup_steps": 1},
    "global_batch": 4,
    "device": "cpu",
}


@pytest.fixture
def folder(tmp_path):
    write_texts(tmp_path / "texts")
    config = {**CONFIG, "out": str(tmp_path / "run")}
    config["data"] = {**CONFIG["data"], "source": str(tmp_path / "texts"), "cache": str(tmp_path / "cache")}
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    (tmp_path / "broken.yaml").write_text("model: {pattern: M\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "typo.yaml").write_text("optimizer: {learning_rate: 1.0}\n")
    for name, content in {
        "json": "not json\n", "field": '{"body": "x"}\n', "number": '{"text": 3}\n', "line": '{"text": "a"}\n[1]\n',
    }.items():  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text(content)
    (tmp_path / "plain.jsonl.gz").write_text("not gzip")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "a" * 9999}).encode())[:-20])
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "none").mkdir()
    (tmp_path / "tokenizer.json").write_text("{}")
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1, "<|end|>": 2}, unk_token="<unk>"))
    words.save(str(tmp_path / "words.json"))
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    (tmp_path / "damaged.jsonl.gz").write_bytes(gzip.compress(b"x" * 999)[:10] + b"\x07" * 40)
    (tmp_path / "file").write_text("")
    for run in ("empty", "other"):
        (tmp_path / run / "checkpoints" / "step-00000001").mkdir(parents=True)
    identity = {"model": {"pattern": "M-M"}, "data": {"seed": 7}}
    (tmp_path / "other" / "checkpoints" / "step-00000001" / "identity.json").write_text(json.dumps(identity))
    return tmp_path


# what is typed after `mamba2-dist`, and what the one line must say
COMMANDS = [
    ("trian good.yaml", "unknown command 'trian'; commands are train, sample, preprocess, plan, calibrate, doctor"),
    ("train missing.yaml", "configuration missing.yaml does not exist; give a YAML file"),
    ("train list.yaml", "must hold 'key: value' lines, got list"),
    ("train broken.yaml", "broken.yaml is not YAML"),
    ("train binary.yaml", "binary.yaml is not"),
    ("train typo.yaml", "unknown key 'optimizer.learning_rate'"),
    ("train good.yaml --steps", "argument '--steps' is not understood; options are written key=value"),
    ("train good.yaml stpes=3", "unknown key 'stpes'; did you mean steps?"),
    ("train good.yaml cp=2", "unknown key 'cp'; did you mean parallel.cp?"),
    ("train good.yaml model.patern=M", "unknown key 'model.patern'; did you mean model.pattern?"),
    ("train good.yaml steps=many", "steps"),
    ("train good.yaml steps=0", "steps must be above 0, got 0"),
    ("train good.yaml precision=fp8", "precision"),
    ("train good.yaml device=tpu", "device"),
    pytest.param(
        "train good.yaml device=cuda parallel.cp=2",
        "torch finds 0; lower parallel.tp, parallel.cp or parallel.dp",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
    ),
    pytest.param(
        "train good.yaml parallel.cp=2 parallel.state_scan=symmetric_memory",
        "parallel.state_scan (symmetric_memory) needs GPUs",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
    ),
    ("train good.yaml preset=mamba3", "preset must be one of mamba2_130m"),
    ("train good.yaml preset=mamba2_130m", "preset (mamba2_130m) and model were both given; remove one"),
    ("train good.yaml model.pattern=MXM", "'X'; layers are M (Mamba-2), *, -"),
    ("train good.yaml model.pattern=M|M", "'|' (pipeline cut) needs a pipeline engine"),
    ("train good.yaml model.pattern=ME", "'E' (mixture of experts) is not supported"),
    ("train good.yaml model.d_model=0", "d_model must be above 0, got 0"),
    ("train good.yaml model.d_model=72", "d_inner (144) must be divisible by headdim (64)"),
    ("train good.yaml model.mamba.ngroups=3", "nheads (2) must be divisible by ngroups (3)"),
    ("train good.yaml model.mamba.d_conv=1", "d_conv must lie in 2..8, got 1"),
    ("train good.yaml model.mamba.dt_limit=[1.0,0.5]", "dt_limit must be (low, high) with 0 <= low <= high"),
    ("train good.yaml model.mamba.A_init_range=[-1.0,2.0]", "A_init_range must be (low, high) with 0 < low"),
    ("train good.yaml model.attention.head_dim=48", "d_model (64) must be divisible by head_dim (48)"),
    ("train good.yaml model.attention.nheads=4 model.attention.nheads_kv=3", "must be divisible by nheads_kv (3)"),
    ("train good.yaml model.mlp.activation=relu", "activation"),
    ("train good.yaml model.vocab_size=200", "model.vocab_size must be above 256"),
    ("train good.yaml parallel.tp=3", "vocab_size (320) must be divisible by tp (3)"),
    ("train good.yaml parallel.tp=4", "nheads (2) must be divisible by tp (4)"),
    ("train good.yaml parallel.tp=0", "tp must be above 0, got 0"),
    ("train good.yaml parallel.layout=spiral", "layout"),
    ("train good.yaml parallel.attention=ring", "attention"),
    (
        "train good.yaml parallel.cp=2 parallel.attention=ulysses",
        "attention (ulysses) needs nheads_kv / tp (1) divisible by the cp ranks of a node (2); set it to auto",
    ),
    ("train good.yaml parallel.state_scan=gossip", "'hierarchical'"),
    ("train good.yaml parallel.sequence_parallel=true", "needs tp above 1; set tp or leave it off"),
    ("train good.yaml parallel.cp=64", "data.seqlen (32) must be at least the number of segments"),
    ("train good.yaml parallel.dp=3", "global_batch (4) must be divisible by dp (3)"),
    ("train good.yaml micro_batch=3", "global_batch / dp (4) must be divisible by micro_batch (3)"),
    ("train good.yaml data.carry=states", "carry"),
    ("train good.yaml data.carry=documents model.pattern=-", "data.carry (documents) is for Mamba-2 layers"),
    ("train good.yaml recompute=conv model.pattern=-", "recompute (conv) is for Mamba-2 layers"),
    ("train good.yaml parts=0", "parts must be above 0, got 0"),
    ("train good.yaml parts=2 model.pattern=M*", "parts (2) above 1 are for patterns without attention"),
    ("train good.yaml parts=40 model.pattern=M", "data.seqlen (32) must be at least the number of segments"),
    ("train good.yaml schedule.warmup_steps=4", "schedule.warmup_steps (4) must be below steps (4)"),
    ("train good.yaml schedule.decay_fraction=0", "decay_fraction must lie in (0, 1], got 0"),
    ("train good.yaml optimizer.betas=[0.9,1.0]", "betas must lie in [0, 1)"),
    ("train good.yaml optimizer.lr=-1", "lr must be above 0, got -1"),
    ("train good.yaml optimizer.weight_decay=-1", "weight_decay must not be below 0"),
    ("train good.yaml data.validation_fraction=1.5", "validation_fraction must lie between 0 and 1, got 1.5"),
    ("train good.yaml data.source=nowhere", "data.source (nowhere) does not exist; give a file, a folder, or 'stdlib'"),
    ("train good.yaml data.source=none", "data.source (none) has no files that end in .txt, .jsonl, .jsonl.gz"),
    ("train good.yaml data.source=json.jsonl", "json.jsonl:1: not JSON"),
    ("train good.yaml data.source=field.jsonl", 'field.jsonl:1: must be an object with a string field "text"'),
    ("train good.yaml data.source=number.jsonl", 'number.jsonl:1: must be an object with a string field "text"'),
    ("train good.yaml data.source=line.jsonl", "line.jsonl:2: must be an object"),
    ("train good.yaml data.source=plain.jsonl.gz", "plain.jsonl.gz: not a whole gzip file"),
    ("train good.yaml data.source=cut.jsonl.gz", "cut.jsonl.gz: not a whole gzip file"),
    ("train good.yaml data.source=latin.txt", "latin.txt: not UTF-8 text at byte 1; convert it"),
    ("train good.yaml data.source=short.txt", "one window needs data.seqlen + 1 (33)"),
    ("train good.yaml data.tokenizer=missing.json", "data.tokenizer (missing.json) does not exist"),
    ("train good.yaml data.tokenizer=tokenizer.json", "data.tokenizer (tokenizer.json) is not a tokenizer.json"),
    ("train good.yaml data.tokenizer=words.json", "must be byte-level, its decoder is None"),
    ("train good.yaml data.end_token=</s> data.tokenizer=words.json", "has no token '</s>'; set data.end_token"),
    ("train good.yaml data.source=half.jsonl", "half.jsonl:1: the text has half a surrogate pair; repair it"),
    ("train good.yaml data.source=damaged.jsonl.gz", "damaged.jsonl.gz: not a whole gzip file"),
    ("train good.yaml data.cache=file", "file"),
    ("train good.yaml out=file", "file"),
    ("train good.yaml seed=-1", "seed must not be below 0, got -1"),
    ("train good.yaml prompt=", "prompt must not be empty"),
    ("train good.yaml model.mamba.A_init_range=[1.0,.inf]", "0 < low <= high and finite"),
    ("train good.yaml optimizer.lr=.inf", "lr must be above 0 and finite, got inf"),
    ("train", "train needs a CONFIG.yaml or key=value"),
    ("train good.yaml out=empty", "step-00000001/identity.json cannot be read"),
    ("train good.yaml out=other", "data.seed is 7 there and 0 here"),
    ("sample empty", "step-00000001/identity.json cannot be read"),
    ("sample nowhere", "run (nowhere) has no checkpoint; train it first"),
    ("sample nowhere tokens=0", "tokens must be above 0, got 0"),
    ("sample nowhere temperature=-1", "temperature must not be below 0, got -1"),
    ("sample nowhere prompt=", "prompt must not be empty"),
    ("plan", "plan needs a CONFIG.yaml or key=value"),
    ("plan good.yaml gpu=8", "unknown key 'gpu'; did you mean gpus?"),
    ("plan good.yaml --gpus many", "gpus must be numbers with commas between them, as in gpus=8,64, got 'many'"),
    ("plan good.yaml --gpus", "as in gpus=8,64, got ''"),
    ("plan good.yaml --gpus 8 gpus=16", "gpus was given twice (8 and 16); give it once"),
    ("plan good.yaml gpus=8,0", "gpus (0) must be above 0 and divisible by parallel.tp * parallel.dp (1)"),
    (
        "plan good.yaml parallel.tp=2 --gpus 3",
        "gpus (3) must be above 0 and divisible by parallel.tp * parallel.dp (2)",
    ),
    ("plan good.yaml gpus=12", "must fill whole nodes of 8 GPUs or lie on one; choose another number"),
    ("plan good.yaml gpus=8 seqlen=4", "seqlen (4) must be at least a token for each of 8 cp ranks"),
    ("plan good.yaml seqlen=0", "seqlen must be above 0, got 0"),
    ("plan good.yaml parallel.state_scan=serial_exact", "parallel.state_scan (serial_exact) has no cost model"),
    ("plan good.yaml model.vocab_size=321 parallel.tp=2", "vocab_size (321) must be divisible by tp (2)"),
    (
        "plan good.yaml gpus=8,16 parallel.state_scan=symmetric_memory",
        "needs all ranks of states (16) on one node, got 2 nodes; choose 'sliced', 'hierarchical' or 'auto'",
    ),
    (
        "plan good.yaml gpus=8 parallel.attention=ulysses",
        "attention (ulysses) needs nheads_kv / tp (1) divisible by the cp ranks of a node (8); set it to auto",
    ),
    ("plan good.yaml machine=missing.json", "write it with `mamba2-dist calibrate out=missing.json`"),
    ("plan good.yaml machine=binary.yaml", "machine (binary.yaml) is not JSON"),
    ("plan good.yaml machine=tokenizer.json", "machine (tokenizer.json): a machine has the fields name, node_size"),
    ("plan good.yaml out=file", "file"),
    ("calibrate out=none", "out (none) must be a file that ends in .json"),
    pytest.param(
        "calibrate out=/proc/machine.json",
        "out (/proc/machine.json) cannot be written (No such file or directory); choose another folder",
        marks=pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that takes no files"),
    ),
    ("calibrate out=file/machine.json", "out (file/machine.json) cannot be written"),
    ("calibrate faster", "argument 'faster' is not understood"),
    ("doctor quickly", "doctor takes --ledger or nothing, got quickly"),
]


@pytest.mark.parametrize(
    ("command", "says"),
    COMMANDS,
    ids=lambda value: value if value.startswith(("train", "sample", "plan", "calibrate", "doctor", "trian")) else "",
)
def test_commands(folder, monkeypatch, capsys, command, says):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stopped:
        main(command.split())
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("mamba2-dist: error: ")
    assert says in lines[0]


def _scan(**changes):
    draw = torch.randn
    arguments = {
        "x": draw(1, 6, 4, 2), "dt": draw(1, 6, 4), "A": -draw(4).abs(), "B": draw(1, 6, 2, 3), "C": draw(1, 6, 2, 3),
    }  # fmt: skip
    return mamba_chunk_scan_combined(**{**arguments, "chunk_size": 4, **changes})


CALLS = [
    (lambda: _scan(x=torch.zeros(6, 4, 2)), r"x must have 4 axes \(batch, seqlen, nheads, headdim\)"),
    (lambda: _scan(dt=torch.zeros(1, 5, 4)), r"dt must have shape \(batch, seqlen, nheads\) = \(1, 6, 4\), got"),
    (lambda: _scan(A=torch.zeros(4, 1)), r"A must have shape \(nheads,\)"),
    (lambda: _scan(B=torch.zeros(1, 6, 3, 3)), r"nheads \(4\) must be divisible by ngroups \(3\)"),
    (lambda: _scan(C=torch.zeros(1, 6, 2, 4)), "C must have shape"),
    (lambda: _scan(D=torch.zeros(3)), r"D must have shape \(4,\) or \(4, 2\), got \(3,\)"),
    (lambda: _scan(z=torch.zeros(1, 6, 4)), "z must have shape"),
    (lambda: _scan(dt_bias=torch.zeros(1)), "dt_bias must have shape"),
    (lambda: _scan(chunk_size=0), "chunk_size must be above 0, got 0"),
    (lambda: _scan(dt_limit=(2.0, 1.0)), "dt_limit must be"),
    (lambda: _scan(initial_states=torch.zeros(1, 4, 2, 4)), "initial_states must have shape"),
    (lambda: _scan(seq_idx=torch.zeros(1, 5)), "seq_idx must have shape"),
    (lambda: _scan(cu_seqlens=torch.tensor([0, 5])), r"must end at the number of tokens \(6\), got 5"),
    (lambda: _scan(cu_seqlens=torch.tensor([0, 4, 2, 6])), "cu_seqlens must not descend"),
    (lambda: _scan(cu_seqlens=torch.tensor([1, 6])), "cu_seqlens must start at 0"),
    (lambda: _scan(dt=torch.zeros(1, 6, 4, device="meta")), r"dt must be on the device of x \(cpu\), got meta"),
    (lambda: _scan(cu_seqlens=torch.tensor([0, 6]), seq_idx=torch.zeros(1, 6)), "give one of them"),
    (lambda: _scan(backend="cuda"), "backend must be one of 'auto', 'triton', 'torch', got 'cuda'"),
    (lambda: causal_conv1d(torch.zeros(2, 6, 4), torch.zeros(3, 4)), "weight must have shape"),
    (lambda: causal_conv1d(torch.zeros(2, 6, 4), torch.zeros(4, 0)), "width must be above 0"),
    (lambda: causal_conv1d(torch.zeros(2, 6, 4), torch.zeros(4, 4), torch.zeros(3)), "bias must have shape"),
    (lambda: causal_conv1d_split(torch.zeros(1, 6, 4), torch.zeros(5, 4), None, [3, 2]), "together at most those of x"),
    (lambda: gated_rmsnorm(torch.zeros(2, 6), torch.zeros(6, device="meta"), eps=1e-5), "on the device of x"),
    (lambda: add_rmsnorm(torch.zeros(2, 6), torch.zeros(3, 6), torch.zeros(6), eps=1e-5), "added must have shape"),
    (lambda: Mamba2Mixer(Mamba2Config(), 64, recompute="all"), "recompute must be one of 'none', 'conv', 'inner'"),
    (lambda: Mamba2Mixer(Mamba2Config(), 0), "d_model must be above 0, got 0"),
    (lambda: Mamba2Mixer(Mamba2Config(), 64, residual_layers=0), "residual_layers must be above 0, got 0"),
    (lambda: Mamba2Mixer(Mamba2Config(), 64, norm_eps=-1.0), "norm_eps must be above 0, got -1"),
    (lambda: HybridModel(HybridConfig(pattern="-"), recompute="conv"), r"recompute \(conv\) is for Mamba-2"),
    (lambda: causal_conv1d(torch.zeros(2, 6, 4), torch.zeros(4, 4), activation="relu"), "activation must be one of"),
    (lambda: causal_conv1d(torch.zeros(2, 6, 4), torch.zeros(4, 4), cu_seqlens=[0, 12]), "flatten the batch first"),
    (lambda: gated_rmsnorm(torch.zeros(2, 6), torch.ones(6), eps=1e-5, group_size=4), "divisible by group_size"),
    (lambda: gated_rmsnorm(torch.zeros(2, 6), torch.ones(5), eps=1e-5), "weight must have shape"),
    (lambda: ParallelGroups(tp=2), r"must equal the number of processes \(1\), got 2 \* 1 \* 1 \* 1 = 2; start 2"),
    (lambda: ParallelGroups(cp=0), "cp must be above 0, got 0"),
    (lambda: ParallelGroups(tp=1.0), r"tp must be an integer, got 1\.0"),
    (lambda: ParallelGroups(device_type="gpu"), "device_type must be one of None, 'cpu', 'cuda', got 'gpu'"),
    (lambda: HybridConfig(pattern=""), "pattern must name at least one layer"),
    (lambda: Mamba2Config(expand=1.1).d_inner(64), r"expand \(1.1\) \* d_model \(64\) must be a whole number"),
    (lambda: AttentionConfig(head_dim=5, rope_theta=1e4), r"head_dim \(5\) must be even for rotary"),
    (lambda: MLPConfig(d_ff=-1), "d_ff must be above 0, got -1"),
    (lambda: ParallelConfig(state_scan="gossip"), "state_scan must be one of 'auto', 'all_gather', 'sliced', 'hier"),
    (lambda: MLPConfig(activation="relu"), "activation must be one of 'swiglu', 'relu2', 'gelu', got 'relu'"),
    (lambda: ParallelConfig(sharding="zero"), "sharding must be one of 'fsdp', 'ddp', got 'zero'"),
    (lambda: HybridModel(HybridConfig(pattern="M", d_model=100)), r"d_inner \(200\) must be divisible by headdim"),
    (
        lambda: Mamba2Mixer(Mamba2Config(), 96)(torch.zeros(1, 4, 64)),
        r"u must have shape \(batch, seqlen, 96\), got \(1, 4, 64\)",
    ),
]


@pytest.mark.parametrize(("call", "message"), CALLS, ids=[message[:40] for _, message in CALLS])
def test_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()
