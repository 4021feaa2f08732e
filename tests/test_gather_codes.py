"""Two ranks have the losses, gradients, codebooks, centres and draws of one with the joined batch: codes and masks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from emkum.stage2_train.objectives.branches import Branches, BranchWeights, branches_mse
from emkum.stage2_train.objectives.codes import codes_ce, nearest_codes
from emkum.stage2_train.objectives.codes_vq import ProductCodebooks, SubCodeHead, codes_vq
from emkum.stage2_train.objectives.dino import DinoHeads, dino
from emkum.stage2_train.objectives.latent import draw_mix, drop_tokens, mix_up
from emkum.stage2_train.objectives.masking import mask_patches, mask_words, vocabulary
from emkum.stage2_train.objectives.mvlm import masked_ce, tokens_at
from emkum.stage2_train.objectives.reduced import ReducedHeads, reduced
from emkum.stage2_train.objectives.token_share import token_share

RANKS, BATCH, WIDTH, LONGEST, STEPS = 2, 8, 6, 10, 3
LENGTHS = torch.tensor([4, 3, 5, 2, 10, 9, 8, 2])  # rank 0 has short captions, rank 1 the long ones
SAME_ON_RANKS = ("books", "counts", "usage", "centre", "weight")


def steps_of(part: slice) -> dict[str, Tensor]:
    """Every objective on `part` of each joined batch; layers with a gradient stand for the student. float64."""
    torch.manual_seed(0)
    layer, code_head = nn.Linear(WIDTH, WIDTH).double(), nn.Linear(WIDTH, 5).double()
    heads, sub_head = ReducedHeads(WIDTH, 3).double(), SubCodeHead(WIDTH, 2, 6).double()
    dinos, books = DinoHeads(WIDTH, 8, 7, 4).double(), ProductCodebooks(WIDTH, 2, 6, momentum=0.7).double()
    codebook, word_head = torch.randn(5, WIDTH).double(), nn.Linear(WIDTH, 40).double()
    student = nn.ModuleList([layer, code_head, heads.student, sub_head, dinos.student, word_head])
    words, source = vocabulary(40, {0, 1, 2}, 3, "cpu"), torch.Generator().manual_seed(5)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        data = torch.Generator().manual_seed(step)
        images, texts, targets = torch.randn(3, BATCH, WIDTH, dtype=torch.float64, generator=data)
        texts_BLD = torch.randn(BATCH, LONGEST, WIDTH, dtype=torch.float64, generator=data)
        ids, mask = torch.randint(4, 40, (BATCH, LONGEST), generator=data), torch.arange(LONGEST) < LENGTHS[:, None]
        images_BD, texts_BD, targets_BD, texts_BLD = (t[part] for t in (images, texts, targets, texts_BLD))
        longest = int(LENGTHS[part].max())  # a rank pads to its own longest text
        ids, mask, texts_BLD = ids[part, :longest], mask[part, :longest], layer(texts_BLD[:, :longest])
        sides = layer(images_BD), layer(texts_BD)

        usage = books.update_(targets_BD)
        hidden = mask_words(ids, mask, words, 0.3, source, length=LONGEST)
        patches = mask_patches(len(ids), (3, 4), 0.4, source, "cpu")
        kept = drop_tokens(texts_BLD[:, :2], 0.5, 0, source)
        weight = draw_mix(0.5, source, "cpu")
        logits = dinos(*sides, targets_BD)
        sight = dino(*logits, dinos.centre_K)
        near = reduced(*heads(*sides, targets_BD))
        coded = codes_ce(code_head(sides[0]), code_head(sides[1]), nearest_codes(targets_BD, codebook))
        quantised = codes_vq(sub_head(sides[0]), sub_head(sides[1]), books.codes(targets_BD))
        taken = tokens_at(texts_BLD, hidden.places_BK, hidden.labels_BK)
        named = masked_ce(word_head(taken), hidden.labels_BK)
        theirs = Branches(images_BD[:, None], 0 * texts_BLD.detach(), 0 * texts_BLD.detach() + 1)
        branches = branches_mse(Branches(sides[0][:, None], texts_BLD, texts_BLD), theirs, mask, BranchWeights())
        mixed = mix_up(sides[0], weight).square().mean() + kept.tokens_BKD.square().mean()
        dinos.update_centre_(logits[2])

        student.zero_grad()
        terms = {"near": near, "coded": coded, "quantised": quantised, "sight": sight, "named": named}
        terms["branches"] = branches
        (sum(term.loss for term in terms.values()) + mixed).backward()
        for name, term in terms.items():
            found |= {f"{step} {name}.{part}": number.detach().double() for part, number in vars(term).items()}
        found |= {f"{step} gradient {name}": p.grad for name, p in student.named_parameters() if p.grad is not None}
        found |= {f"{step} books": books.sums_SJC, f"{step} counts": books.counts_SJ, f"{step} centre": dinos.centre_K}
        found |= {f"{step} usage {name}": number for name, number in vars(usage).items()}
        found |= {f"{step} weight": weight, f"{step} rows {longest} masked": hidden.ids_BL}
        found |= {f"{step} rows patches": patches.mask_BN, f"{step} rows kept": kept.kept_BK}
        found = {name: number.detach().clone() for name, number in found.items()}
        with torch.no_grad():  # a step of one student on all ranks
            for parameter in student.parameters():
                parameter.add_(0.1)
        heads.update_(0.9), dinos.update_teacher_(0.9)
    return found


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    share = BATCH // RANKS
    torch.save(steps_of(slice(rank * share, (rank + 1) * share)), Path(folder) / f"found {rank}")
    torch.save(token_share(torch.tensor(0)), Path(folder) / f"share {rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.spawn(one_rank, (str(folder),), RANKS)
    return folder


def test_two_ranks_have_what_one_has_with_the_joined_batch(folder: Path) -> None:
    """Losses and gradients averaged over ranks, as data parallelism does. What ranks keep is equal bit by bit."""
    ranks, whole = [torch.load(folder / f"found {rank}") for rank in range(RANKS)], steps_of(slice(None))
    compared = 0
    for name, expected in whole.items():
        if " rows " in name:
            continue
        both = [found[name] for found in ranks]
        torch.testing.assert_close(sum(both) / RANKS, expected, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
        if name.split()[1].split(".")[-1] in SAME_ON_RANKS:
            assert torch.equal(*both), name
            compared += 1
    assert compared == STEPS * (len(SAME_ON_RANKS) + 2)  # usage is three numbers


def test_a_sample_has_the_same_words_and_patches_hidden_on_any_number_of_ranks(folder: Path) -> None:
    ranks, whole = [torch.load(folder / f"found {rank}") for rank in range(RANKS)], steps_of(slice(None))
    for step in range(STEPS):
        for name in (f"{step} rows patches", f"{step} rows kept"):
            assert torch.equal(torch.cat([found[name] for found in ranks]), whole[name])
        shown = whole[f"{step} rows 10 masked"]
        assert torch.equal(ranks[0][f"{step} rows 5 masked"], shown[:4, :5])
        assert torch.equal(ranks[1][f"{step} rows 10 masked"], shown[4:])


def test_ranks_without_a_token_have_no_share(folder: Path) -> None:
    assert [torch.load(folder / f"share {rank}").item() for rank in range(RANKS)] == [0.0, 0.0]
    assert token_share(torch.tensor(0)).item() == 0
    assert token_share(torch.tensor(7)).item() == 1
