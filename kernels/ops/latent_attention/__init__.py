"""`reattend::latent_attention`: absorbed MLA over a cache of latent rows and rotary keys."""

from __future__ import annotations

from reattend.kernels.latent_attention.register import latent_attention

__all__ = ["latent_attention"]
