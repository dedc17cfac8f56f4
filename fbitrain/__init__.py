"""fbitrain: pretrain language models whose linear weights are one bit each, by distilling a full-precision teacher."""

__version__ = "0.1.0"
