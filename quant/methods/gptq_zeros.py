"""Zero points of GPTQ checkpoints: one number, stored four ways.

The second version (``gptq_v2``, ``gptq_p``) stores a zero point as it is. The first stores it less one, and writers disagree
on what that makes of zero:

=============================  ===========================================  ==========================================
writer                         stores                                       read here as
=============================  ===========================================  ==========================================
GPTQModel, 2, 4 and 8 bits     the packed word less ``0x1111...``, with     the word plus ``0x1111...``, with carries:
                               borrows from field to field                  exact
GPTQModel, 3, 5, 6 and 7 bits  every field less one, modulo                 (field + 1) modulo: exact
auto-gptq                      -1, whose bits overwrite all higher fields   as its own modules do: (field + 1) modulo;
                                                                            field + 1 for 3 bits and for act-order
auto-round                     never: a zero point of 0 becomes 1           (field + 1) modulo
=============================  ===========================================  ==========================================

Sources: GPTQModel 7.7.0 ``utils/model.py`` (``convert_gptq_v1_to_v2_format_module``), auto-gptq 0.7.1
``qlinear_cuda_old.py`` and ``qlinear_cuda.py``, auto-round 0.16.1 ``export_to_autogptq``.
"""

from __future__ import annotations

import torch
from torch import Tensor

GPTQMODEL = "gptqmodel"
AUTO_ROUND = "auto-round"


def with_carry(words: Tensor, bits: int) -> Tensor:
    """Packed words plus one in every field, carries running from field to field as GPTQModel's borrows did."""
    ones = sum(1 << place for place in range(0, 8 * words.dtype.itemsize, bits))
    return words + torch.tensor(ones, dtype=words.dtype, device=words.device)


def carries(bits: int, producer: str) -> bool:
    """Whether fields of a first-version word borrowed from each other."""
    return producer == GPTQMODEL and bits in (2, 4, 8)


def next_code(fields: Tensor, bits: int, producer: str, act_order: bool) -> Tensor:
    """First-version fields plus one. ``producer`` is unknown for auto-gptq, which never wrote its name."""
    if producer not in (GPTQMODEL, AUTO_ROUND) and (bits == 3 or act_order) and bits < 8:
        return fields + 1
    return fields + 1 & 2**bits - 1
