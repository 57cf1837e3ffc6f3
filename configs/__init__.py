"""Packaged configurations: `sista fit --config pretrain.yaml` finds them by name."""
