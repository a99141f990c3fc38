"""Which matrix of a layer is which, by its name in every family."""

# What a matrix computes. `gate` is what passes the activation function where `up` does not.
ROLES = ("query", "key", "value", "output", "gate", "up", "down")

# Name inside a layer -> its roles; several where one matrix computes several at once.
NAMES: dict[str, tuple[str, ...]] = {
    # BERT, RoBERTa, XLM-R, ELECTRA
    "attention.self.query": ("query",),
    "attention.self.key": ("key",),
    "attention.self.value": ("value",),
    "attention.output.dense": ("output",),
    "intermediate.dense": ("up",),
    "output.dense": ("down",),
    # ALBERT
    "attention.query": ("query",),
    "attention.key": ("key",),
    "attention.value": ("value",),
    "attention.dense": ("output",),
    "ffn": ("up",),
    "ffn_output": ("down",),
    # DistilBERT
    "attention.q_lin": ("query",),
    "attention.k_lin": ("key",),
    "attention.v_lin": ("value",),
    "attention.out_lin": ("output",),
    "ffn.lin1": ("up",),
    "ffn.lin2": ("down",),
    # ModernBERT
    "attn.Wqkv": ("query", "key", "value"),
    "attn.Wo": ("output",),
    "mlp.Wi": ("gate", "up"),
    "mlp.Wo": ("down",),
    # GPT-2
    "attn.c_attn": ("query", "key", "value"),
    "attn.c_proj": ("output",),
    "mlp.c_fc": ("up",),
    "mlp.c_proj": ("down",),
    # GPT-NeoX; its output projection is called as ALBERT's
    "attention.query_key_value": ("query", "key", "value"),
    "mlp.dense_h_to_4h": ("up",),
    "mlp.dense_4h_to_h": ("down",),
    # Persimmon; its other matrices are called as those of GPT-NeoX and Phi
    "self_attn.query_key_value": ("query", "key", "value"),
    # OPT, Phi, Llama, Mistral, Qwen, Gemma
    "self_attn.q_proj": ("query",),
    "self_attn.k_proj": ("key",),
    "self_attn.v_proj": ("value",),
    "self_attn.out_proj": ("output",),
    "self_attn.o_proj": ("output",),
    "self_attn.dense": ("output",),
    "fc1": ("up",),
    "fc2": ("down",),
    "mlp.fc1": ("up",),
    "mlp.fc2": ("down",),
    "mlp.gate_proj": ("gate",),
    "mlp.up_proj": ("up",),
    "mlp.down_proj": ("down",),
}
# Whose several results alternate head by head; those of the others stand side by side.
BY_HEAD = ("attention.query_key_value", "self_attn.query_key_value")
FAMILIES = (
    "BERT, RoBERTa, XLM-R, ELECTRA, ALBERT, DistilBERT, ModernBERT, GPT-2, GPT-NeoX, OPT, Phi, "
    "Llama, Mistral, Qwen or Gemma"
)
