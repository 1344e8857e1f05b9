"""The shapes of the parameters of real models, in the order in which their modules hold them."""

from collections.abc import Iterator

from benchmarks.optimizers import Shape


def gpt2() -> Iterator[Shape]:
    """GPT-2 of 124 M parameters: https://huggingface.co/openai-community/gpt2."""
    width, vocabulary, context, layers = 768, 50257, 1024, 12
    norm = [(width,), (width,)]
    yield (vocabulary, width)
    yield (context, width)
    for _ in range(layers):
        yield from norm
        yield from [(width, 3 * width), (3 * width,), (width, width), (width,)]
        yield from norm
        yield from [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    yield from norm


def llama() -> Iterator[Shape]:
    """Llama 3.2 of 1.24 B parameters, embedding and output tied: https://huggingface.co/meta-llama/Llama-3.2-1B."""
    width, vocabulary, inner, kv, layers = 2048, 128256, 8192, 512, 16
    yield (vocabulary, width)
    for _ in range(layers):
        yield from [(width, width), (kv, width), (kv, width), (width, width)]
        yield from [(inner, width), (inner, width), (width, inner)]
        yield from [(width,), (width,)]
    yield (width,)


def moe() -> Iterator[Shape]:
    """A mixture of 64 experts in each of 16 layers, every expert's three matrices parameters of their own."""
    width, vocabulary, inner, experts, layers = 768, 50257, 256, 64, 16
    yield (vocabulary, width)
    for _ in range(layers):
        yield from [(width,), (3 * width, width), (width, width), (width,), (experts, width)]
        for _ in range(experts):
            yield from [(inner, width), (inner, width), (width, inner)]
    yield (width,)


MODELS = {"GPT-2 124M": gpt2, "Llama 1B": llama, "MoE of 64 experts": moe}
