"""Sections ``compression_training`` and ``sparse_attention``."""

from __future__ import annotations

from typing import Any, Literal

from .section import Int, Section, key


class LayerReductionConfig(Section):
    """Fewer layers, initialized from some of a teacher's."""

    enabled: bool = key(False, "Reduce layers.")
    keep_number_layer: Int | None = key(None, "Layers that stay.", unit="layers", ge=1)
    module_name_prefix: str | None = key(None, "The list of layers in the model.")
    teacher_layer: list[Int] = key([], "Layers of the teacher to start from.", unit="layers")
    other_module_name: list[str] = key([], "Other modules to take from the teacher.")


class TechniqueConfig(Section):
    """One way to compress: what all groups share, and groups of modules with what is their own."""

    shared_parameters: dict[str, Any] = key({}, "enabled, schedule_offset and the keys of the technique.")
    different_groups: dict[str, Any] = key({}, "By name: params, modules, related_modules.")

    @property
    def enabled(self) -> bool:
        """Whether the technique is on."""
        return bool(self.shared_parameters.get("enabled"))


class CompressionConfig(Section):
    """Compression during training. On where one of its techniques is."""

    layer_reduction: LayerReductionConfig = LayerReductionConfig()
    weight_quantization: TechniqueConfig = TechniqueConfig()
    activation_quantization: TechniqueConfig = TechniqueConfig()
    sparse_pruning: TechniqueConfig = TechniqueConfig()
    row_pruning: TechniqueConfig = TechniqueConfig()
    head_pruning: TechniqueConfig = TechniqueConfig()
    channel_pruning: TechniqueConfig = TechniqueConfig()

    @property
    def enabled(self) -> bool:
        """Whether any technique is on."""
        return any(getattr(self, name).enabled for name in type(self).model_fields)


class SparseAttentionConfig(Section):
    """Block-sparse attention. On with a mode other than dense."""

    mode: Literal["dense", "fixed", "variable", "bigbird", "bslongformer", "local"] = key("dense", "The pattern of blocks.")
    block: Int = key(16, "Side of a block.", unit="tokens", ge=1)
    different_layout_per_head: bool = key(False, "A pattern of its own for each head.")
    num_local_blocks: Int = key(4, "Blocks of a local window (fixed).", unit="blocks", ge=0)
    num_global_blocks: Int = key(1, "Blocks that represent their window (fixed, bigbird).", unit="blocks", ge=0)
    attention: Literal["bidirectional", "unidirectional"] = key("bidirectional", "Whether tokens see later ones.")
    horizontal_global_attention: bool = key(False, "Global blocks also attend to all others.")
    num_different_global_patterns: Int = key(1, "Patterns of global blocks among heads (fixed).", unit="patterns", ge=1)
    num_random_blocks: Int = key(0, "Random blocks in each row (variable, bigbird).", unit="blocks", ge=0)
    local_window_blocks: list[Int] = key([4], "Sizes of local windows (variable).", unit="blocks")
    global_block_indices: list[Int] = key([0], "Global blocks, or where their ranges start.", unit="blocks")
    global_block_end_indices: list[Int] | None = key(None, "Where the ranges of global blocks end.", unit="blocks")
    num_sliding_window_blocks: Int = key(3, "Blocks of the sliding window.", unit="blocks", ge=0)
