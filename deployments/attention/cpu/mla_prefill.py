"""A prompt's latent attention on CPU in memory that grows with the prompt: vLLM's holds heads x S x S scores, twice.

Legend: T rows (new tokens of all requests), S keys, N heads, Q width of a query and key, V width of a value.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from deployments.attention.vllm_internals import CPUSDPAMLAPrefillBackend


class LinearMemoryPrefill(CPUSDPAMLAPrefillBackend):
    """torch's flash attention for CPU, request by request."""

    def _ragged_sdpa(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_cu_seq_lens: torch.Tensor,
        kv_cu_seq_lens: torch.Tensor,
        causal: bool,
        return_softmax_lse: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of each request's queries to its keys -> [T, N, V], and the log of the sum of exponentials,
        float32 [N, T], where it is asked for. `q` [T, N, Q], `k` [S, N, Q], `v` [S, N, V]; `*_cu_seq_lens`: where each
        request's rows begin, and the last end.
        """
        width = v.shape[-1]
        out_TNV = q.new_empty(q.shape[0], q.shape[1], width)
        lse_NT = torch.empty(q.shape[1], q.shape[0])
        queries, keys = q_cu_seq_lens.tolist(), kv_cu_seq_lens.tolist()
        for request in range(len(queries) - 1):
            rows, columns = slice(*queries[request : request + 2]), slice(*keys[request : request + 2])
            if columns.start == columns.stop:
                out_TNV[rows], lse_NT[:, rows] = 0, -torch.inf
                continue
            q_NTQ, k_NSQ, v_NSV = (one.transpose(0, 1)[None] for one in (q[rows], k[columns], v[columns]))
            v_NSQ = pad(v_NSV, (0, q.shape[-1] - width))  # the operator wants one width
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_NTQ, k_NSQ, v_NSQ, 0.0, causal, scale=self.scale
            )
            out_TNV[rows] = out[0, ..., :width].transpose(0, 1)
            lse_NT[:, rows] = lse[0]
        return (out_TNV, lse_NT) if return_softmax_lse else out_TNV
