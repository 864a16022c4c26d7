"""Megatron's hybrid language model by the name it has in this version, with this library's loss."""

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from mamba2_dist.config import require
from mamba2_dist.parallel.cross_entropy import vocab_parallel_cross_entropy
from mamba2_dist.parallel.groups import Group

from .spec import hybrid_stack_spec
from .versions import HybridModel, version


class Model(HybridModel):  # type: ignore[misc, valid-type]
    """Megatron's, whose plain loss keeps the logits in float32; this library's keeps them in their own dtype."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """(batch, seqlen), (seqlen, batch, vocab_size/tp) -> (batch, seqlen); 0 where the label is -100."""
        if self.config.cross_entropy_loss_fusion:
            return super().compute_language_model_loss(labels, logits)
        tp = Group.of("tp", self.pg_collection.tp)
        losses = vocab_parallel_cross_entropy(logits, labels.transpose(0, 1), tp, compiled=logits.is_cuda)
        return losses.transpose(0, 1).contiguous()


def hybrid_model(
    config: Any,
    pattern: str,
    *,
    spec: ModuleSpec = hybrid_stack_spec,
    pg_collection: ProcessGroupCollection | None = None,
    **options: Any,
) -> Any:
    """megatron-core's `HybridModel`, or `MambaModel` before 0.18, of the layers in `pattern`.

    The loss is this library's, on a GPU by torch.compile; with `config.cross_entropy_loss_fusion` it is Megatron's.

    pattern: Megatron's letters, with `|` between pipeline stages; without, stages have as many layers each. Behind `/`
        stand the layers that predict further tokens.
    options: of that class, vocab_size and max_sequence_length among them; pre_process and post_process follow from the
        pipeline group where they are left out.
    Raises ValueError unless `config.num_layers` is the number of layers before `/`, for virtual stages whose
    pre_process and post_process are left out, and before 0.17 for virtual stages and those of different length.
    """
    main, slash, further = pattern.partition("/")
    letters = main.replace("|", "")
    require(
        config.num_layers == len(letters),
        f"num_layers ({config.num_layers}) must be the number of layers in the pattern ({len(letters)})",
    )
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    stage, stages = groups.pp.rank(), groups.pp.size()
    ends = {"pre_process": stage == 0, "post_process": stage == stages - 1}
    require(
        options.get("vp_stage") is None or options.keys() >= ends.keys(),
        "pre_process and post_process must be given with vp_stage: they are true on one virtual stage each",
    )
    options = {**ends, "pg_collection": groups, **options}
    virtual = config.virtual_pipeline_model_parallel_size
    require(
        virtual is None or not version.startswith("0.16"),
        f"virtual_pipeline_model_parallel_size ({virtual}) of a hybrid needs megatron-core 0.17 or newer",
    )
    parts = stages * (virtual or 1)
    uneven = config.num_layers_in_first_pipeline_stage, config.num_layers_in_last_pipeline_stage
    if "|" not in main and parts > 1 and uneven == (None, None):
        require(
            len(letters) % parts == 0,
            f"{len(letters)} layers cannot be shared out evenly to {parts} pipeline stages; cut the pattern with '|'",
        )
        each = len(letters) // parts
        main = "|".join(letters[i : i + each] for i in range(0, len(letters), each))
    if not version.startswith("0.16"):
        return Model(config, spec, hybrid_layer_pattern=main + slash + further, **options)
    require(
        not slash and len({len(part) for part in main.split("|")}) == 1,
        f"pattern ({pattern}) must have stages of one length and no '/' in megatron-core {version}; take 0.17 or newer",
    )
    return Model(config, spec, hybrid_override_pattern=letters, **options)
