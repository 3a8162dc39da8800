"""The Vision Transformer of DINOv2: patches of 14 pixels, LayerScale, optional registers,
several crop sizes in one pass; and the reading and writing of its weights.

    python vit.py CHECKPOINT                                    # what a file holds
    python vit.py CHECKPOINT IMAGE [IMAGE ...] --show OUT.png   # tokens as colours, attention
    python vit.py CHECKPOINT --export OUT.pth                   # for other tools

    model = build_vit("vitb14")                     # new weights
    model = load_backbone("teacher_12500.pt")       # ours, or what load_backbone lists
    out = model(images)                             # (B, 3, H, W), normalised, multiples of 14
    out["cls"], out["registers"], out["patches"]    # (B, D), (B, R, D), (B, N, D)

Names and shapes in the state dict are those of the released weights, so that an official file
loads strictly. B images, T = 1 + R + N tokens in the order [cls | registers | patches], D width,
nh heads, hd = D / nh, h x w patch grid.
"""
import argparse
import contextlib
import glob
import json
import math
import os
import pathlib
import pickle
import re
import time
import zipfile

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from custom_kernels.attention import attention

ARCHS = {
    "vitt14": dict(dim=192, depth=12, heads=3),  # ours, for CPUs and classrooms; not in the paper
    "vits14": dict(dim=384, depth=12, heads=6),
    "vitb14": dict(dim=768, depth=12, heads=12),
    "vitl14": dict(dim=1024, depth=24, heads=16),
    "vitg14": dict(dim=1536, depth=40, heads=24, ffn="swiglu"),
}
ARCHS |= {f"{name}_reg4": dict(config, registers=4) for name, config in ARCHS.items()}


class PatchEmbed(nn.Module):
    """Each 14 x 14 patch becomes one token by one linear map. Patches do not overlap, so the map
    over all of them is a convolution whose stride is its width."""

    def __init__(self, dim, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):
        x = self.proj(images)                # (B, 3, H, W) -> (B, D, h, w)
        return x.flatten(2).transpose(1, 2)  # (B, N, D)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) within each sequence of a packed batch."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)  # query, key and value in one product
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, runs):
        # Here alone tokens of one image see each other, so here alone `runs` must say which
        # belong together
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (T_total, 3, nh, hd)
        return self.proj(attention(qkv, runs).flatten(1))     # (T_total, D)


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """Gated feed-forward (Shazeer 2020), in place of the MLP in ViT-g."""

    def __init__(self, dim):
        super().__init__()
        # It has three matrices where the MLP has two: two thirds of the MLP's width keep the
        # number of weights, rounded up to a multiple of 8, which matrix units like
        hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        # The gate first: the other order would load as well, and be wrong
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learnt factor per channel on a residual branch (Touvron et al. 2021, CaiT)."""

    def __init__(self, dim, init):
        super().__init__()
        # Near 0: a deep new network starts as almost the identity, and each branch grows as it
        # is of use
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block over a packed batch of sequences: x + f(norm(x)), twice."""

    def __init__(self, dim, heads, ffn, layerscale):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)  # not PyTorch's 1e-5: so DINOv2 was trained
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim, layerscale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = {"mlp": Mlp, "swiglu": SwiGLU}[ffn](dim)
        self.ls2 = LayerScale(dim, layerscale)

    def forward(self, x, runs, rows=None, factor=None):
        """x (T_total, D). With stochastic depth, `runs` describes the kept samples alone, rows
        (2, R) are their tokens for the attention and the feed-forward branch, and factor (R, 1)
        rescales: b / k of the row's crop group."""
        if rows is None:
            x = x + self.ls1(self.attn(self.norm1(x), runs))
            return x + self.ls2(self.mlp(self.norm2(x)))
        # The branch is computed for the kept samples alone, which is what makes stochastic depth
        # cheap; it is added back where they stand, and the others pass as they are.
        # index_select, because the gradient of x[rows] would first sort the rows on a GPU
        branch = self.ls1(self.attn(self.norm1(x.index_select(0, rows[0])), runs))  # (R, D)
        x = x.index_add(0, rows[0], (branch * factor).to(x.dtype))
        branch = self.ls2(self.mlp(self.norm2(x.index_select(0, rows[1]))))
        return x.index_add(0, rows[1], (branch * factor).to(x.dtype))


class VisionTransformer(nn.Module):
    """dim D, depth blocks, heads nh; ffn "mlp" or "swiglu"; registers R; image_size fixes the
    stored position embedding's grid (other sizes are interpolated); layerscale: initial gamma;
    drop_path: stochastic-depth rate, the same in all blocks."""

    def __init__(self, dim, depth, heads, ffn="mlp", registers=0, image_size=224, patch_size=14,
                 layerscale=1e-5, drop_path=0.0):
        super().__init__()
        self.dim, self.depth, self.heads, self.ffn = dim, depth, heads, ffn
        self.registers, self.patch_size, self.drop_path = registers, patch_size, drop_path
        self.arch = None  # the name in ARCHS, where there is one
        self.checkpoint_activations = False  # True: compute each block again in the backward pass
        n_patches = (image_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + n_patches, dim))  # the class token's first
        if registers:  # tokens that no loss asks for: scratch space (Darcet et al. 2024)
            self.register_tokens = nn.Parameter(torch.empty(1, registers, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # stands for a hidden patch (iBOT)
        self.patch_embed = PatchEmbed(dim, patch_size)
        self.blocks = nn.ModuleList(Block(dim, heads, ffn, layerscale) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.init_weights()

    def init_weights(self):
        """DINOv2's initialisation. The patch convolution keeps PyTorch's default: the official
        code touches Linear alone."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.registers:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images, masks=None, kept=None):
        """images (B, 3, H, W); masks (B, N) bool, True where the patch is hidden behind the mask
        token.

        Returns {"cls": (B, D), "registers": (B, R, D), "patches": (B, N, D)} after the final
        norm. Raises ValueError when H or W is not a multiple of the patch size."""
        return self.forward_packed([images], [masks], kept)[0]

    def forward_packed(self, images, masks, kept=None):
        """Crop groups of several sizes as one packed sequence: equal to one forward per group,
        in fewer and larger matrix products (DINOv2 section 5, "sequence packing").

        images: list of (B_g, 3, H_g, W_g); masks: list of (B_g, N_g) bool or None; kept: from
        draw_kept (drawn here when training without it). Returns a list of dicts as `forward`
        does."""
        x, runs = self.pack([self.embed(i, m) for i, m in zip(images, masks, strict=True)])
        if kept is None:
            kept = self.draw_kept([count for count, _ in runs])
        rows, factor, block_runs = [None] * self.depth, None, runs
        if kept is not None:
            rows, factor, block_runs = kept_rows([k.to(x.device) for k in kept], runs)
        for block, r in zip(self.blocks, rows):
            if self.checkpoint_activations:
                x = checkpoint(block, x, block_runs, r, factor, use_reentrant=False,
                               preserve_rng_state=False)  # nothing in a block is drawn
            else:
                x = block(x, block_runs, r, factor)
        return self.unpack(self.norm(x), runs)

    def intermediate(self, images, layers, norm=True):
        """The tokens after the blocks named in `layers` (0 is the first; negative counts from
        the end), each through the final norm if `norm`: a list of dicts as `forward` returns, in
        the order of `layers`. No stochastic depth."""
        wanted = [range(self.depth)[i] for i in layers]
        x, runs = self.pack([self.embed(images)])
        found = {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            x = block(x, runs)
            if i in wanted:
                found[i] = self.unpack(self.norm(x) if norm else x, runs)[0]
        return [found[i] for i in wanted]

    def draw_kept(self, counts, generator=None):
        """Batch-subset stochastic depth (DINOv2 section 5): for every block, branch and crop
        group of `counts` images, the k = max(int(b(1-r)), 1) samples whose branch is computed.
        Returns a list of (depth, 2, k) int64, or None where nothing is dropped.

        Drawn before the blocks: a draw inside one would differ when activation checkpointing
        runs it again."""
        if not self.training or self.drop_path == 0:
            return None
        kept = []
        for b in counts:
            order = torch.rand(self.depth, 2, b, generator=generator).argsort(-1)
            kept.append(order[..., : max(int(b * (1 - self.drop_path)), 1)])  # of a random permutation
        return kept

    def embed(self, images, masks=None):
        """Tokens before the first block: (B, 3, H, W), (B, N) bool or None -> (B, T, D)."""
        H, W = images.shape[-2:]
        p = self.patch_size
        if H % p or W % p:
            near = "x".join(str(max(round(side / p), 1) * p) for side in (H, W))
            raise ValueError(f"images of {H}x{W} pixels do not divide into patches of {p}: "
                             f"the nearest sizes that do are {near}")
        x = self.patch_embed(images)                                      # (B, N, D)
        if masks is not None:
            # Before the positions are added: the student must know which patch it is to guess
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, D)
        x = x + self.position_embedding(H // p, W // p)
        if self.registers:  # after the positions: they have none
            registers = self.register_tokens.expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        return x                                                          # (B, T, D)

    def position_embedding(self, h, w):
        """The stored grid, resized to h x w patches as the released weights expect it: (1, 1 +
        h*w, D).

        Gradients flow through the resize to the stored grid, which so stays the one that was
        loaded: a 37 x 37 grid trained on crops of 7 x 7 patches still serves images of 37 x
        37."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if h == w == side:
            return self.pos_embed
        # In float32 whatever the weights are: in bfloat16 neighbouring positions would become
        # one
        grid = self.pos_embed[:, 1:].float().unflatten(1, (side, side))
        grid = grid.permute(0, 3, 1, 2)                                      # (1, D, side, side)
        if self.registers:
            grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=True)
        else:
            # Why 0.1: given a scale, PyTorch computes the new size as floor(side * scale), which
            # in floating point can come out one short (11 * (15 / 11) is 14.999999999999998).
            # DINO added 0.1 to be safe. The same scale sets where the grid is sampled, so the
            # released weights have learnt with it: a resize to size=(h, w) would shift every
            # position a little. The models with registers came later and resize by size, with
            # antialiasing.
            scale = (h + 0.1) / side, (w + 0.1) / side
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")   # (1, D, h, w)
        grid = grid.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)      # (1, h*w, D)
        return torch.cat([self.pos_embed[:, :1], grid], dim=1)

    @torch.no_grad()
    def resize_position_embedding(self, image_size):
        """Store the position embedding for square images of `image_size` pixels."""
        side = image_size // self.patch_size
        self.pos_embed = nn.Parameter(self.position_embedding(side, side).clone())

    def pack(self, groups):
        """list of (B_g, T_g, D) -> (sum of B_g * T_g, D), ((B_g, T_g), ...).

        All tokens of all crops in one tall matrix without padding: only attention needs to know
        where an image begins, and it is told by `runs`: B_g sequences of T_g tokens, group after
        group."""
        rows = [group.flatten(0, 1) for group in groups]
        x = rows[0] if len(rows) == 1 else torch.cat(rows)  # one group needs no copy
        return x, tuple((group.shape[0], group.shape[1]) for group in groups)

    def unpack(self, x, runs):
        """(T_total, D) -> one dict of cls (B_g, D), registers (B_g, R, D), patches (B_g, N_g, D)
        per crop group."""
        out, first = [], 1 + self.registers  # the first patch
        for group, run in zip(x.split([count * length for count, length in runs]), runs):
            tokens = group.unflatten(0, run)                              # (B_g, T_g, D)
            out.append({"cls": tokens[:, 0], "registers": tokens[:, 1:first],
                        "patches": tokens[:, first:]})
        return out


def kept_rows(kept, runs):
    """Sample numbers -> token rows of the packed batch.

    kept: list of (depth, 2, k_g); runs ((b_g, length_g), ...). Returns rows (depth, 2, R) with R
    the sum of k_g * length_g, factor (R, 1) = b_g / k_g, and the runs ((k_g, length_g), ...) of
    the kept samples."""
    rows, factors, start = [], [], 0
    for samples, (b, length) in zip(kept, runs, strict=True):
        k = samples.shape[-1]
        within = torch.arange(length, device=samples.device)
        tokens = start + samples[..., None] * length + within             # (depth, 2, k, length)
        rows.append(tokens.flatten(2))
        # k of b samples have a branch: times b / k, its expected sum over the batch is what it
        # would be
        factors.append(torch.full((k * length, 1), b / k, device=samples.device))
        start += b * length
    kept_runs = tuple((samples.shape[-1], length) for samples, (_, length) in zip(kept, runs))
    return torch.cat(rows, dim=2), torch.cat(factors), kept_runs


def build_vit(arch, **overrides):
    """A new VisionTransformer named in ARCHS; `overrides` replace or add constructor
    arguments."""
    if arch not in ARCHS:
        raise ValueError(f"unknown architecture {arch!r}: choose one of {', '.join(ARCHS)}")
    model = VisionTransformer(**dict(ARCHS[arch], **overrides))
    model.arch = arch
    return model


# --- number types ------------------------------------------------------------------------------

# The choices of --precision, beside auto
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def precision(device, wanted="auto"):
    """The type in which `device` multiplies matrices: wanted is "auto" or a name of PRECISIONS;
    returns a torch.dtype.

    auto is bfloat16 where the hardware multiplies it (emulation answers yes too, and crawls: a
    T4), float16 on other GPUs, float32 on other CPUs. torch is asked, not a list of processors;
    one that cannot say means no."""
    if wanted != "auto":
        return PRECISIONS[wanted]
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "mps":
        return torch.float16
    questions = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    native = any(getattr(torch.cpu, question, lambda: False)() for question in questions)
    return torch.bfloat16 if native else torch.float32


def autocast(device, dtype):
    """The context in which a forward pass computes its matrix products in dtype; float32 changes
    nothing."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


# --- files -------------------------------------------------------------------------------------

RELEASED_URL = "https://dl.fbaipublicfiles.com/dinov2"
RELEASED = tuple(f"dinov2_{arch}" for arch in ARCHS if not arch.startswith("vitt"))
READABLE = ("teacher_<step>.pt, best.pt, last.pt, a released DINOv2 file or its name (dinov2_vits14), "
            "a DINOv2 training checkpoint or a timm dinov2 model")


@contextlib.contextmanager
def replacing(path):
    """A temporary name to write; it becomes `path` at the end. Whenever the process or the
    machine stops, the old file or the whole new one is there."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{os.getpid()}{path.suffix}")
    clear_leavings(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # the bytes before the name, or a power cut leaves an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def clear_leavings(path):
    """Delete what killed writers of `path` left: temporary files, a day old, whose process does
    not live on this machine."""
    begin = f".{path.stem}.tmp"
    for left in path.parent.glob(glob.escape(begin) + "*" + glob.escape(path.suffix)):
        number = left.name.removeprefix(begin).removesuffix(path.suffix)
        if number.isdigit() and not lives(int(number)):
            with contextlib.suppress(OSError):  # another process may have been faster
                if time.time() - left.stat().st_mtime > 24 * 3600:
                    left.unlink()


def lives(pid):
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # somebody else's
    return True


def atomic_save(obj, path):
    """torch.save that leaves either the old file or the whole new one; OSError on a full disk."""
    # An open file, because torch.save writes a name that it is given into the archive
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(obj, file)
        except RuntimeError as error:  # what torch makes of an OSError when it closes the file
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def save_backbone(path, model, arch, step=0, args=None, metrics=None):
    """Write a backbone file: tensors and plain Python values only, so that it loads without
    running code."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    atomic_save({"format": "endodino-1", "arch": arch, "heads": model.heads, "backbone": state,
                 "step": step, "args": args or {}, "metrics": metrics or {}}, path)


def export_backbone(path, model):
    """Write the weights as the released files hold them: the state dict alone, with its
    names."""
    atomic_save({name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}, path)


def load_backbone(path, device="cpu", image_size=None):
    """A frozen-ready backbone (eval mode, float32) from a file of ours, a released DINOv2 file,
    a DINOv2 training checkpoint (its teacher) or a timm dinov2 model, as torch.save or
    safetensors wrote it; or from a name in RELEASED, which is downloaded once.

    The architecture, the registers and the image size are read off the tensors; every name and
    shape must fit and every weight be finite. image_size (pixels) resizes the stored position
    embedding; by default it stays, and forward interpolates it for other sizes. Prints one line.
    Raises OSError, or ValueError with one sentence that says what is wrong with the file."""
    file = read_checkpoint(path)
    state, kind = find_backbone(file, path)
    config = infer_config(state, file, path)
    with torch.device("meta"):  # shapes alone: no weights are drawn only to be replaced
        model = VisionTransformer(**config)
    check_same_tensors(model.state_dict(), state, path)
    check_finite(state, path)
    model.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    shape = {k: config[k] for k in ("dim", "depth", "heads", "ffn", "registers")}
    for name, arch in ARCHS.items():
        if shape == {"ffn": "mlp", "registers": 0} | arch:
            model.arch = name
    if image_size is not None:
        model.resize_position_embedding(image_size)
    ours = file if kind.startswith("endodino") else {}
    model.info = {"path": str(path), "arch": model.arch, "format": kind,
                  "step": ours.get("step"), "args": ours.get("args", {}),
                  "metrics": ours.get("metrics", {})}
    count = sum(p.numel() for p in model.parameters())
    print(f"{path}: {model.arch or config}, {kind}, {config['image_size']} px position embedding, "
          f"{count:,} parameters, all {len(state)} tensors matched")
    return model.requires_grad_(True).to(device).eval()


def read_checkpoint(path, mmap=False):
    """What a file holds, or the released weights of a name in RELEASED; one clear sentence for
    whatever is neither. No code in the file is ever run. mmap: tensors stay on the disk until used."""
    if str(path) in RELEASED and not os.path.exists(path):
        return fetch(str(path))
    with open(path, "rb") as file:  # what open raises names the path by itself
        head = file.read(9)
    if head[8:] == b"{":  # after the length of its header, safetensors begins a JSON object
        return read_safetensors(path)
    if head[:2] == b"PK" and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is truncated: it begins like a checkpoint but its end is missing; "
                         "copy or download it again")
    if head[:2] != b"PK" and head[:1] != b"\x80":
        raise ValueError(f"{path} is not a PyTorch checkpoint (it begins with {head[:2]!r})")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is damaged or holds more than tensors and plain values, and is "
                         "refused because loading it could run code; save its state dict alone"
                         ) from error
    except Exception as error:
        words = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged: {words}") from error


def fetch(name):
    """The state dict of released weights, downloaded once into torch.hub's folder."""
    url = f"{RELEASED_URL}/{name.removesuffix('_reg4')}/{name}_pretrain.pth"
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", progress=True,
                                                  weights_only=True)
    except OSError as error:  # urllib's errors are of this kind
        raise OSError(f"{name} could not be downloaded ({error}): fetch {url} where there is a "
                      "network, and give the path of that file instead of the name") from error


def read_safetensors(path):
    """The tensors of a .safetensors file: 8 bytes with the length of a JSON header, the header
    with the type, shape and place of each tensor, then their bytes."""
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    content = bytearray(pathlib.Path(path).read_bytes())  # not bytes: the tensors share it
    start = 8 + int.from_bytes(content[:8], "little")
    tensors = {}
    try:
        for name, entry in json.loads(content[8:start]).items():
            if name != "__metadata__":
                low, high = (start + offset for offset in entry["data_offsets"])
                flat = torch.frombuffer(content[low:high], dtype=types[entry["dtype"]])
                tensors[name] = flat.reshape(entry["shape"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged, or no .safetensors file of floating-point weights: "
                         f"{type(error).__name__} {error}") from error
    return tensors


def find_backbone(file, path):
    """The backbone's state dict under released names, and the kind of file it came from."""
    if not isinstance(file, dict):
        raise ValueError(f"{path} holds a {type(file).__name__}, not a dictionary of weights")
    state, kind = file, "released DINOv2 weights"
    if file.get("format") == "endodino-1":
        state, kind = file.get("backbone"), "endodino-1"
    elif inner := [k for k, v in file.items() if isinstance(v, dict) and any(map(is_class_token, v))]:
        name = the_one(inner, path)  # one level down, as "teacher", "model", "state_dict" ...
        state, kind = file[name], f"weights in {name!r}"
        if name == "teacher":
            kind = "DINOv2 training checkpoint (teacher)"
        if file.get("format") == "endodino-run-1":
            kind = "endodino run (teacher)"
    state = without_prefix(state if isinstance(state, dict) else {}, path)
    if "cls_token" not in state or not all(torch.is_tensor(v) for v in state.values()):
        found = few([str(k) for k in file])
        raise ValueError(f"{path} holds no backbone (its first entries: {found}); give {READABLE}, "
                         "not an optimiser checkpoint")
    return from_timm(state), kind


def is_class_token(name):
    return f".{name}".endswith(".cls_token")


def the_one(places, path):
    """The only one of several places of weights, or the teacher's, which is the one to use.
    Others are refused: to guess would be wrong in silence."""
    places = [place for place in places if "teacher" in str(place)] or places
    if len(places) > 1:
        raise ValueError(f"{path} holds several sets of weights ({few([str(p) for p in places])}): "
                         "save the one that you mean alone")
    return places[0]


def without_prefix(state, path):
    """The entries beside the class token, under the released names.

    What wrappers put before the names goes: DDP's `module.`, torch.compile's `_orig_mod.`
    (within names too), `backbone.`, beside which dino_head. and ibot_head. stand and are left
    out."""
    state = {str(k).replace("_orig_mod.", ""): v for k, v in state.items()}
    places = [k.removesuffix("cls_token") for k in state if is_class_token(k)]
    if not places:
        return {}
    prefix = the_one(places, path)
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    # blocks.{chunk}.{index}.name -> blocks.{index}.name: the index counts from the first block
    # of all
    names = {k: re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", k) for k in state}
    if len(set(names.values())) < len(names):
        raise ValueError(f"{path} holds tensors that would get the same released name")
    return {names[k]: v for k, v in state.items()}


def from_timm(state):
    """A timm dinov2 model's tensors under the released names and shapes; others pass as they
    are."""
    state = dict(state)
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
    if "mask_token" not in state:  # whole images never use it, and zeros are how it starts
        state["mask_token"] = torch.zeros(1, state["cls_token"].shape[-1])
    positions = state.get("pos_embed", torch.empty(1, 2))
    if positions.dim() == 3 and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        # Patches alone: the class token's position was added to the token itself, so it gets
        # zeros
        state["pos_embed"] = F.pad(positions, (0, 0, 1, 0))                  # (1, N, D) -> (1, 1 + N, D)
    fc1, fc2 = (state.get(f"blocks.0.mlp.{name}.weight", torch.empty(1, 1)) for name in ("fc1", "fc2"))
    if len(fc1) == 2 * fc2.shape[-1]:  # twice as wide as what comes after it: SwiGLU's two matrices
        for name in [name for name in state if ".mlp.fc" in name]:
            new = name.replace(".fc1.", ".w12.").replace(".fc2.", ".w3.")
            state[new] = state.pop(name)
    return state


def infer_config(state, file, path):
    """The constructor's arguments, read off the tensors' names and shapes."""
    try:
        dim = state["cls_token"].shape[-1]
        patch_size = state["patch_embed.proj.weight"].shape[-1]
        n_patches = state["pos_embed"].shape[1] - 1
        depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
        registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{path} lacks part of a backbone: no usable {error}; "
                         f"give {READABLE}") from error
    if n_patches != math.isqrt(n_patches) ** 2:
        raise ValueError(f"{path}: pos_embed has {n_patches} patch positions, no square grid")
    heads = max(dim // 64, 1)  # all released models have heads of 64 channels; our files say it
    if file.get("format") == "endodino-1":
        heads = file.get("heads", heads)
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise ValueError(f"{path} says {heads} heads, which do not divide a width of {dim}")
    return dict(dim=dim, depth=depth, heads=heads, registers=registers, patch_size=patch_size,
                ffn="swiglu" if any(".mlp.w12." in k for k in state) else "mlp",
                image_size=math.isqrt(n_patches) * patch_size)


def check_same_tensors(wanted, found, path):
    """Raise a ValueError that lists the first few names that are missing, surplus or of another
    shape."""
    both = [name for name in wanted if name in found]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "surplus": [name for name in found if name not in wanted],
        "misshapen": [f"{name} {tuple(found[name].shape)} for {tuple(wanted[name].shape)}"
                      for name in both if found[name].shape != wanted[name].shape]}
    words = [f"{len(names)} {what} ({few(names)})" for what, names in problems.items() if names]
    if words:
        raise ValueError(f"{path} does not fit the architecture that its tensors suggest: "
                         f"{'; '.join(words)}")


def check_finite(state, path):
    """Raise a ValueError for weights that are NaN or infinite: with them a probe would fit for
    an hour to no avail, and a picture would be drawn that means nothing."""
    bad = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{path} holds weights that are not finite ({few(bad)}): the run that "
                         "wrote it had diverged; give an earlier teacher_<step>.pt")


def few(names, most=4):
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


# --- pictures ----------------------------------------------------------------------------------


@torch.no_grad()
def class_attention(model, images):
    """How much the class token attends to each patch in the last block: (B, 3, H, W) -> (B, nh,
    N), sums at most 1 (what is missing goes to the class token itself and to the registers)."""
    x, runs = model.pack([model.embed(images)])
    for block in model.blocks[:-1]:
        x = block(x, runs)
    block = model.blocks[-1]
    # The attention kernels never keep their weights, so the last block's are computed here
    qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, model.heads, -1))
    qkv = qkv.unflatten(0, runs[0])                                       # (B, T, 3, nh, hd)
    query, keys = qkv[:, 0, 0], qkv[:, :, 1]                              # (B, nh, hd), (B, T, nh, hd)
    scores = torch.einsum("bhd,bthd->bht", query, keys) / math.sqrt(query.shape[-1])
    return scores.softmax(-1)[..., 1 + model.registers :]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="What a backbone file holds; what it sees in images, as patch tokens in colours "
        "and the class token's attention; and its weights for other tools.")
    add = parser.add_argument
    add("checkpoint", help=READABLE)
    add("images", nargs="*", help="image files for --show")
    add("--show", metavar="OUT.png", help="picture to write, a row for each image")
    add("--beside", nargs="+", default=[], metavar="CHECKPOINT",
        help="more checkpoints, shown beside the first one on the same images")
    add("--masks", nargs="+", default=[], metavar="MASK",
        help="a mask file for each image, whose border is drawn on it")
    add("--size", type=int, default=518,
        help="px of the longer side, as the networks get it; more shows finer detail "
        "(default: %(default)s)")
    add("--export", metavar="OUT.pth",
        help="write the weights alone, with the names of the released files")
    args = parser.parse_args(argv)
    if bool(args.show) != bool(args.images):
        parser.error("--show OUT.png and image files belong together")
    if args.masks and len(args.masks) != len(args.images):
        parser.error(f"--masks: {len(args.masks)} for {len(args.images)} images")
    if args.size < 1:
        parser.error("--size must be positive")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        models = {path: load_backbone(path, device) for path in [args.checkpoint, *args.beside]}
        if args.export:
            export_backbone(args.export, models[args.checkpoint])
            print(f"wrote {args.export}")
        if args.show:
            import figures  # lazily, as the next: the model needs neither
            from data import read_mask
            masks = [read_mask(path) for path in args.masks]
            figures.tokens(models, args.images, args.show, args.size, masks=masks)
            print(f"wrote {args.show}")
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
