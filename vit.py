"""The Vision Transformer of DINOv2: patches of 14 pixels, LayerScale, optional registers, several crop sizes in one pass.

    python vit.py CHECKPOINT IMAGE [IMAGE ...] --show OUT.png    # what it sees: patch tokens as colours, attention

    model = build_vit("vitb14")                     # new weights
    model = load_backbone("teacher_12500.pt")       # ours, a released DINOv2 file, or a DINOv2 training checkpoint
    out = model(images)                             # images (B, 3, H, W), normalised; H and W multiples of 14
    out["cls"], out["registers"], out["patches"]    # (B, D), (B, R, D), (B, N, D), after the final norm

Names and shapes in the state dict are those of the released weights, so that an official file loads strictly.
B images, T = 1 + R + N tokens in the order [cls | registers | patches], D width, nh heads, hd = D / nh, h x w patch grid.
"""
import argparse
import contextlib
import math
import os
import pathlib
import pickle
import re
import zipfile

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from custom_kernels.attention import attention

ARCHS = {
    "vitt14": dict(dim=192, depth=12, heads=3),  # our own small one, for CPUs and classrooms; not in the paper
    "vits14": dict(dim=384, depth=12, heads=6),
    "vitb14": dict(dim=768, depth=12, heads=12),
    "vitl14": dict(dim=1024, depth=24, heads=16),
    "vitg14": dict(dim=1536, depth=40, heads=24, ffn="swiglu"),
}
ARCHS |= {f"{name}_reg4": dict(config, registers=4) for name, config in ARCHS.items()}


class PatchEmbed(nn.Module):
    def __init__(self, dim, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)  # (B, 3, H, W) -> (B, D, h, w) -> (B, N, D)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, runs):
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
    """Gated feed-forward (Shazeer 2020): two thirds of the MLP's width, rounded up to a multiple of 8; gate first."""

    def __init__(self, dim):
        super().__init__()
        hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learnt factor per channel on a residual branch (Touvron et al. 2021, CaiT)."""

    def __init__(self, dim, init):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block over a packed batch of sequences."""

    def __init__(self, dim, heads, ffn, layerscale):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim, layerscale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = {"mlp": Mlp, "swiglu": SwiGLU}[ffn](dim)
        self.ls2 = LayerScale(dim, layerscale)

    def forward(self, x, runs, rows=None, factor=None):
        """x (T_total, D). With stochastic depth, `runs` describes the kept samples alone, rows (2, R) are their tokens
        for the attention and the feed-forward branch, and factor (R, 1) rescales: b / k of the row's crop group."""
        if rows is None:
            x = x + self.ls1(self.attn(self.norm1(x), runs))
            return x + self.ls2(self.mlp(self.norm2(x)))
        # index_select, because the gradient of x[rows] would first sort the rows on a GPU
        branch = self.ls1(self.attn(self.norm1(x.index_select(0, rows[0])), runs))  # (R, D): only the kept samples are computed
        x = x.index_add(0, rows[0], (branch * factor).to(x.dtype))
        branch = self.ls2(self.mlp(self.norm2(x.index_select(0, rows[1]))))
        return x.index_add(0, rows[1], (branch * factor).to(x.dtype))


class VisionTransformer(nn.Module):
    """dim D, depth blocks, heads nh; ffn "mlp" or "swiglu"; registers R; image_size fixes the stored position embedding's
    grid (other sizes are interpolated); layerscale: initial gamma; drop_path: stochastic-depth rate, the same in all blocks.
    """

    def __init__(self, dim, depth, heads, ffn="mlp", registers=0, image_size=224, patch_size=14, layerscale=1e-5, drop_path=0.0):
        super().__init__()
        self.dim, self.depth, self.heads, self.ffn, self.registers = dim, depth, heads, ffn, registers
        self.patch_size, self.drop_path = patch_size, drop_path
        self.arch = None                    # the name in ARCHS, where there is one
        self.checkpoint_activations = False  # recompute each block in the backward pass instead of keeping its activations
        n_patches = (image_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + n_patches, dim))
        if registers:
            self.register_tokens = nn.Parameter(torch.empty(1, registers, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = PatchEmbed(dim, patch_size)
        self.blocks = nn.ModuleList(Block(dim, heads, ffn, layerscale) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.init_weights()

    def init_weights(self):
        """DINOv2's initialisation. The patch convolution keeps PyTorch's default: the official code touches Linear alone."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.registers:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images, masks=None, kept=None):
        """images (B, 3, H, W); masks (B, N) bool, True where the patch is hidden behind the mask token.

        Returns {"cls": (B, D), "registers": (B, R, D), "patches": (B, N, D)} after the final norm.
        Raises ValueError when H or W is not a multiple of the patch size."""
        return self.forward_packed([images], [masks], kept)[0]

    def forward_packed(self, images, masks, kept=None):
        """Crop groups of several sizes as one packed sequence: equal to one forward per group, in fewer and larger matrix
        products (DINOv2 section 5, "sequence packing"). images: list of (B_g, 3, H_g, W_g); masks: list of (B_g, N_g) bool
        or None; kept: from draw_kept (drawn here when training without it). Returns a list of dicts as `forward` does."""
        x, runs = self.pack([self.embed(i, m) for i, m in zip(images, masks, strict=True)])
        if kept is None:
            kept = self.draw_kept([count for count, _ in runs])
        rows, factor, block_runs = [None] * self.depth, None, runs
        if kept is not None:
            rows, factor, block_runs = kept_rows([k.to(x.device) for k in kept], runs)
        for block, r in zip(self.blocks, rows):
            if self.checkpoint_activations:
                x = checkpoint(block, x, block_runs, r, factor, use_reentrant=False)
            else:
                x = block(x, block_runs, r, factor)
        return self.unpack(self.norm(x), runs)

    def intermediate(self, images, layers, norm=True):
        """The tokens after the blocks named in `layers` (0 is the first; negative counts from the end), each through the
        final norm if `norm`: a list of dicts as `forward` returns, in the order of `layers`. No stochastic depth."""
        wanted = [range(self.depth)[i] for i in layers]
        x, runs = self.pack([self.embed(images)])
        found = {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            x = block(x, runs)
            if i in wanted:
                found[i] = self.unpack(self.norm(x) if norm else x, runs)[0]
        return [found[i] for i in wanted]

    def draw_kept(self, counts, generator=None):
        """Batch-subset stochastic depth: for every block, branch and crop group of `counts` images, the k = max(int(b(1-r)), 1)
        samples whose branch is computed. Returns a list of (depth, 2, k) int64, or None where nothing is dropped.

        Drawn before the blocks: a draw inside one would differ when activation checkpointing runs it again."""
        if not self.training or self.drop_path == 0:
            return None
        orders = [torch.rand(self.depth, 2, b, generator=generator).argsort(-1) for b in counts]  # random permutations
        return [order[..., : max(int(b * (1 - self.drop_path)), 1)] for order, b in zip(orders, counts)]

    def embed(self, images, masks=None):
        """Tokens before the first block: (B, 3, H, W), (B, N) bool or None -> (B, T, D)."""
        H, W = images.shape[-2:]
        p = self.patch_size
        if H % p or W % p:
            raise ValueError(f"images of {H}x{W} pixels do not divide into patches of {p}: the nearest sizes that do are "
                             f"{max(round(H / p), 1) * p}x{max(round(W / p), 1) * p}")
        x = self.patch_embed(images)                                                 # (B, N, D)
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype), x)        # masked tokens keep their position
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)             # (B, 1 + N, D)
        x = x + self.position_embedding(H // p, W // p)
        if self.registers:                                                           # they have no position
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        return x                                                                     # (B, T, D)

    def position_embedding(self, h, w):
        """The stored grid, resized to h x w patches as the released weights expect it: (1, 1 + h*w, D).

        Without registers DINOv2 passes a scale factor computed with an offset of 0.1, so that the sampling positions differ
        a little from those of a plain resize to h x w; its register models resize by size, with antialiasing."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if h == w == side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
        if self.registers:
            grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=True)
        else:
            grid = F.interpolate(grid, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)], dim=1)

    @torch.no_grad()
    def resize_position_embedding(self, image_size):
        """Store the position embedding for square images of `image_size` pixels."""
        side = image_size // self.patch_size
        self.pos_embed = nn.Parameter(self.position_embedding(side, side).clone())

    def pack(self, groups):
        """list of (B_g, T_g, D) -> (sum of B_g * T_g, D), ((B_g, T_g), ...)."""
        x = groups[0].flatten(0, 1) if len(groups) == 1 else torch.cat([g.flatten(0, 1) for g in groups])
        return x, tuple((g.shape[0], g.shape[1]) for g in groups)

    def unpack(self, x, runs):
        """(T_total, D) -> one dict of cls (B_g, D), registers (B_g, R, D), patches (B_g, N_g, D) per crop group."""
        out, R = [], self.registers
        for group, run in zip(x.split([count * length for count, length in runs]), runs):
            tokens = group.unflatten(0, run)                                         # (B_g, T_g, D)
            out.append({"cls": tokens[:, 0], "registers": tokens[:, 1 : 1 + R], "patches": tokens[:, 1 + R :]})
        return out


def kept_rows(kept, runs):
    """Sample numbers -> token rows of the packed batch.

    kept: list of (depth, 2, k_g); runs ((b_g, length_g), ...). Returns rows (depth, 2, R) with R the sum of k_g * length_g,
    factor (R, 1) = b_g / k_g, which keeps each branch's expected sum, and the runs ((k_g, length_g), ...) of the kept samples."""
    rows, factors, start = [], [], 0
    for samples, (b, length) in zip(kept, runs, strict=True):
        k = samples.shape[-1]
        tokens = start + samples[..., None] * length + torch.arange(length, device=samples.device)  # (depth, 2, k, length)
        rows.append(tokens.flatten(2))
        factors.append(torch.full((k * length, 1), b / k, device=samples.device))
        start += b * length
    kept_runs = tuple((samples.shape[-1], length) for samples, (_, length) in zip(kept, runs))
    return torch.cat(rows, dim=2), torch.cat(factors), kept_runs


def build_vit(arch, **overrides):
    """A new VisionTransformer named in ARCHS; `overrides` replace or add constructor arguments."""
    if arch not in ARCHS:
        raise ValueError(f"unknown architecture {arch!r}: choose one of {', '.join(ARCHS)}")
    model = VisionTransformer(**dict(ARCHS[arch], **overrides))
    model.arch = arch
    return model


# --- number types -----------------------------------------------------------------------------------------------------

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # choices of --precision, beside auto


def precision(device, wanted="auto"):
    """The type in which `device` multiplies matrices: wanted is "auto" or a name of PRECISIONS; returns a torch.dtype.

    auto is bfloat16 where the hardware multiplies it (emulation answers yes too, and crawls: a T4), float16 on
    other GPUs, float32 on other CPUs. torch is asked, not a list of processors; one that cannot say means no."""
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
    """The context in which a forward pass computes its matrix products in dtype; float32 changes nothing."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


# --- files ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path):
    """A temporary name to write; it becomes `path` at the end. Whenever the process or the machine stops, the old file or the whole new
    one is there."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_save(obj, path):
    """torch.save that leaves either the old file or the whole new one."""
    with replacing(path) as temporary, open(temporary, "wb") as file:  # given a name, torch.save would write it into the file
        torch.save(obj, file)


def save_backbone(path, model, arch, step=0, args=None, metrics=None):
    """Write a backbone file: tensors and plain Python values only, so that it loads without running code."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    atomic_save({"format": "endodino-1", "arch": arch, "heads": model.heads, "backbone": state,
                 "step": step, "args": args or {}, "metrics": metrics or {}}, path)


def load_backbone(path, device="cpu", image_size=None):
    """A frozen-ready backbone (eval mode, float32) from our files, released DINOv2 files or DINOv2 training checkpoints.

    The architecture, the registers and the image size are read off the tensors; every name and shape must fit. image_size
    (pixels) resizes the stored position embedding; by default it stays, and forward interpolates it for other sizes.
    Prints one line. Raises FileNotFoundError, or ValueError with one sentence that says what is wrong with the file."""
    file = read_checkpoint(path)
    state, kind = find_backbone(file, path)
    config = infer_config(state, file, path)
    with torch.device("meta"):
        model = VisionTransformer(**config)
    check_same_tensors(model.state_dict(), state, path)
    model.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    size = {k: config.get(k, 0) for k in ("dim", "depth", "heads", "registers")} | {"ffn": config["ffn"]}
    names = [name for name, arch in ARCHS.items() if size == {"ffn": "mlp", "registers": 0} | arch]
    model.arch = names[0] if names else None
    if image_size is not None:
        model.resize_position_embedding(image_size)
    model.info = {"path": str(path), "arch": model.arch, "format": kind, "step": file.get("step") if kind == "endodino-1" else None,
                  "metrics": file.get("metrics", {}) if kind == "endodino-1" else {}}
    print(f"{path}: {model.arch or config}, {kind}, {config['image_size']} px position embedding, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters, all {len(state)} tensors matched")
    return model.requires_grad_(True).to(device).eval()


def read_checkpoint(path):
    """torch.load of plain tensors, with one clear sentence for whatever is not that. No code in the file is ever run."""
    with open(path, "rb") as f:  # FileNotFoundError, IsADirectoryError and PermissionError name the path themselves
        head = f.read(2)
    if head == b"PK" and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is truncated: it begins like a checkpoint but its end is missing; copy or download it again")
    if head != b"PK" and head[:1] != b"\x80":
        raise ValueError(f"{path} is not a PyTorch checkpoint (it begins with {head!r})")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is damaged or holds more than tensors and plain values, and is refused because loading it could "
                         "run code; save its state dict alone") from error
    except Exception as error:
        raise ValueError(f"{path} is damaged: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def find_backbone(file, path):
    """The backbone's state dict under released names, and the kind of file it came from."""
    if not isinstance(file, dict):
        raise ValueError(f"{path} holds a {type(file).__name__}, not a dictionary of backbone weights")
    kind = "released DINOv2 weights"
    if file.get("format") == "endodino-1":
        file, kind = file.get("backbone"), "endodino-1"
    elif isinstance(file.get("teacher"), dict):
        file, kind = file["teacher"], "DINOv2 training checkpoint (teacher)"
    file = file if isinstance(file, dict) else {}
    if any(str(k).startswith("backbone.") for k in file):  # beside it stand dino_head. and ibot_head.
        file = {k.removeprefix("backbone."): v for k, v in file.items() if k.startswith("backbone.")}
    # blocks.{chunk}.{index}.name -> blocks.{index}.name: the index inside a chunk is already the block's number
    state = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", str(k)): v for k, v in file.items()}
    if "cls_token" not in state or len(state) != len(file) or not all(torch.is_tensor(v) for v in state.values()):
        found = ", ".join(str(k) for k in list(file)[:4])
        raise ValueError(f"{path} holds no backbone (its first entries: {found}); give a teacher_<step>.pt, best.pt or a "
                         "released DINOv2 file, not a resume or optimiser checkpoint")
    return state, kind


def infer_config(state, file, path):
    """The constructor's arguments, read off the tensors' names and shapes."""
    try:
        dim = state["cls_token"].shape[-1]
        patch_size = state["patch_embed.proj.weight"].shape[-1]
        n_patches = state["pos_embed"].shape[1] - 1
        depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
        registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{path} lacks part of a backbone: no usable {error}") from error
    if n_patches != math.isqrt(n_patches) ** 2:
        raise ValueError(f"{path}: pos_embed has {n_patches} patch positions, which is no square grid")
    heads = file["heads"] if file.get("format") == "endodino-1" and "heads" in file else max(dim // 64, 1)
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise ValueError(f"{path} says {heads} heads, which do not divide a width of {dim}")
    ffn = "swiglu" if any(".mlp.w12." in k for k in state) else "mlp"
    return dict(dim=dim, depth=depth, heads=heads, ffn=ffn, registers=registers, patch_size=patch_size,
                image_size=math.isqrt(n_patches) * patch_size)


def check_same_tensors(wanted, found, path):
    """Raise a ValueError that lists the first few names that are missing, surplus or of another shape."""
    missing = [k for k in wanted if k not in found]
    surplus = [k for k in found if k not in wanted]
    misshapen = [f"{k} {tuple(found[k].shape)} for {tuple(v.shape)}" for k, v in wanted.items()
                 if k in found and found[k].shape != v.shape]
    problems = [f"{len(names)} {what} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
                for what, names in (("missing", missing), ("surplus", surplus), ("misshapen", misshapen)) if names]
    if problems:
        raise ValueError(f"{path} does not fit the architecture that its tensors suggest: {'; '.join(problems)}")


# --- pictures ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def class_attention(model, images):
    """How much the class token attends to each patch in the last block: (B, 3, H, W) -> (B, nh, N), sums at most 1."""
    x, runs = model.pack([model.embed(images)])
    for block in model.blocks[:-1]:
        x = block(x, runs)
    block = model.blocks[-1]
    qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, model.heads, -1)).unflatten(0, runs[0])  # (B, T, 3, nh, hd)
    query, keys = qkv[:, 0, 0], qkv[:, :, 1]                                                        # (B, nh, hd), (B, T, nh, hd)
    scores = torch.einsum("bhd,bthd->bht", query, keys) / math.sqrt(query.shape[-1])
    return scores.softmax(-1)[..., 1 + model.registers :]


def main(argv=None):
    import figures  # lazily: the model needs no pictures
    parser = argparse.ArgumentParser(description="What a backbone sees in images: patch tokens as colours, the class token's attention.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", help="teacher_<step>.pt, best.pt, a released DINOv2 file or a DINOv2 training checkpoint")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--show", required=True, metavar="OUT.png", help="picture to write")
    parser.add_argument("--size", type=int, default=518, help="px of the longer side, as the network gets it; more shows finer detail")
    args = parser.parse_args(argv)
    try:
        model = load_backbone(args.checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
        figures.tokens({args.checkpoint: model}, args.images, args.show, args.size)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print(f"wrote {args.show}")


if __name__ == "__main__":
    main()
