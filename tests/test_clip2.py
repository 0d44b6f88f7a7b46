"""Stage 2: the teacher, the relation loss over processes, gradient caching, published names, whole runs."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from networks import TINY
from reaf_hsenet import distributed
from reaf_hsenet.config import ClipConfig, GuidedVisionConfig
from reaf_hsenet.data.loader import Batch
from reaf_hsenet.models.clip import build_dual_encoder
from reaf_hsenet.models.slice_guidance import ViT2E3
from reaf_hsenet.train.contrastive import Contrastive, Guided, Teacher, encode
from reaf_hsenet.train.grad_cache import GradCache
from reaf_hsenet.train.losses import contrastive_logits, contrastive_loss, relation_loss
from reaf_hsenet.weights.files import load_matching, load_strictly
from reaf_hsenet.weights.names import M3D_CLIP, import_state, teacher_tensors
from reaf_hsenet.weights.shapes import initial_state
from tiny import published_stage2

SLICES, SLICE_WIDTH = 5, 12
STUDENT = replace(
    TINY,
    vision=GuidedVisionConfig(
        **vars(TINY.vision), slices=SLICES, slice_width=SLICE_WIDTH, guidance_dropout=0.0
    ),
)
CPU = torch.device("cpu")


def data(rows=6) -> Batch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 50, (rows, 12), generator=generator)
    ids[rows // 2] = ids[0]  # two patients with the same report
    volume = torch.rand(rows, 1, 8, 16, 16, generator=generator)
    slices = torch.randn(rows, SLICES, SLICE_WIDTH, generator=generator)
    return Batch(volume, ids, torch.ones_like(ids), list(range(rows)), slices)


def models():
    torch.manual_seed(0)
    teacher = build_dual_encoder(TINY).double()
    return teacher, build_dual_encoder(STUDENT).double().eval()


def guided(teacher, images_change=True, chunk=2) -> Guided:
    return Guided(Teacher(teacher, CPU, None, chunk, images_change), 0.1, 100)


def double(batch: Batch) -> Batch:
    return replace(batch, volume=batch.volume.double(), slices=batch.slices.double())


def test_loss_is_contrastive_plus_weighted_relation_with_the_students_scale():
    teacher, student = models()
    batch = double(data())
    with torch.no_grad():
        student.logit_scale.fill_(3.3)
        image, text, scale = encode(student, batch)
        first = contrastive_logits(*teacher.eval()(batch.volume, batch.ids, batch.mask)[:2], scale)
    logits = contrastive_logits(image, text, scale)
    expected = contrastive_loss(logits) + 0.1 * (1 - 40 / 100) * relation_loss(logits, first)
    loss, numbers = guided(teacher).loss(encode(student, batch), batch, step=40)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert numbers["relation"].item() == pytest.approx(relation_loss(logits, first).item(), rel=1e-5)
    assert guided(teacher).loss(encode(student, batch), batch, step=100)[0].item() == pytest.approx(
        contrastive_loss(logits).item(), rel=1e-6
    )


def test_the_teacher_is_frozen_and_gets_no_gradient():
    teacher, student = models()
    batch = double(data())
    guided(teacher).loss(encode(student, batch), batch, 0)[0].backward()
    assert not teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert student.vision.guidance.query.weight.grad.abs().max() > 0


def counting(teacher):
    seen = {"volumes": 0, "reports": 0}
    teacher.vision.register_forward_hook(
        lambda _, x, __: seen.__setitem__("volumes", seen["volumes"] + len(x[0]))
    )
    teacher.text.register_forward_hook(
        lambda _, x, __: seen.__setitem__("reports", seen["reports"] + len(x[0]))
    )
    return seen


def test_the_teacher_encodes_a_distinct_report_once_and_a_fixed_volume_once():
    for images_change, volumes in ((True, 12), (False, 6)):
        teacher, _ = models()
        seen, batch, keeper = counting(teacher), double(data()), guided(teacher, images_change).teacher
        one, two = keeper.features(batch), keeper.features(batch)
        assert seen == {"volumes": volumes, "reports": 5}
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        with torch.no_grad():
            image, text, _ = teacher(batch.volume, batch.ids, batch.mask)
        assert torch.allclose(one[0].double(), image, atol=1e-6) and torch.allclose(
            one[1].double(), text, atol=1e-6
        )


def test_a_report_of_other_words_is_encoded_anew():
    teacher, _ = models()
    seen, batch, keeper = counting(teacher), double(data()), guided(teacher).teacher
    keeper.features(batch)
    keeper.features(replace(batch, ids=batch.ids.flip(1)))
    assert seen["reports"] == 10


def test_the_teacher_keeps_a_bounded_number_of_reports_the_last_used():
    teacher, _ = models()
    seen, batch = counting(teacher), double(data())
    keeper = Teacher(teacher, CPU, None, 2, True, kept_reports=6)
    keeper.features(batch)  # 5 distinct ones
    for shift in range(1, 5):
        shortened = replace(batch, ids=batch.ids.roll(shift, 1)).split(1)[0]
        keeper.features(shortened)
        keeper.features(batch.split(1)[0])
        assert len(keeper.texts) == 6
    assert seen["reports"] == 5 + 4


def test_cached_gradients_of_stage_2_are_those_of_one_pass():
    teacher, student = models()
    batch, stage = double(data()), guided(teacher)
    stage.loss(encode(student, batch), batch, 0)[0].backward()
    expected = {n: p.grad.clone() for n, p in student.named_parameters()}
    student.zero_grad()
    parts = batch.split(4)
    cache = GradCache(lambda i: encode(student, parts[i]), len(parts), CPU)
    stage.loss(cache.features, batch, 0)[0].backward()
    cache.backward()
    for name, parameter in student.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-7), name


def one_rank(rank: int, world: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=world)
    teacher, student = models()
    ddp = DistributedDataParallel(student)
    batch = double(data()).split(3)[rank]
    guided(teacher).loss(encode(ddp, batch), batch, 0)[0].backward()
    torch.save({n: p.grad for n, p in student.named_parameters()}, f"{path}/rank{rank}.pt")
    del ddp  # before its group, see distributed.stop
    distributed.stop()


@pytest.mark.slow
def test_two_processes_have_the_stage_2_gradients_of_one(tmp_path):
    mp.start_processes(one_rank, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    teacher, student = models()
    batch = double(data())
    guided(teacher).loss(encode(student, batch), batch, 0)[0].backward()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for name, parameter in student.named_parameters():
            assert torch.allclose(found[name], parameter.grad, atol=1e-7), name


def test_slice_features_change_the_embedding_and_depend_on_their_order_only_through_themselves():
    _, student = models()
    batch = double(data())
    with torch.no_grad():
        image = student.encode_image(batch.volume, batch.slices)
        # Attention over slices has no positions: their order is in the features alone.
        assert torch.allclose(student.encode_image(batch.volume, batch.slices.flip(1)), image, atol=1e-12)
        assert (student.encode_image(batch.volume, -batch.slices) - image).abs().max() > 1e-6


def test_slice_features_of_another_shape_are_refused():
    _, student = models()
    batch = double(data())
    with pytest.raises(ValueError, match=r"\(4, 12\), this encoder takes \(5, 12\)"):
        student.encode_image(batch.volume, batch.slices[:, :4])


def test_a_published_stage_2_checkpoint_gives_student_and_teacher():
    teacher, student = models()
    published = published_stage2(student, teacher)
    assert "stage1_pretrained_CLIP.language_encoder.encoder.layer.1.attention.self.key.weight" in published
    torch.manual_seed(9)
    other_teacher, other = build_dual_encoder(TINY).double(), build_dual_encoder(STUDENT).double()
    load_strictly(other, import_state(M3D_CLIP, published), "stage 2")
    load_strictly(other_teacher, import_state(M3D_CLIP, teacher_tensors(published)), "stage 2")
    for mine, loaded in ((student, other), (teacher, other_teacher)):
        assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in mine.state_dict().items())
    again = published_stage2(other, other_teacher)
    assert again.keys() == published.keys() and all(torch.equal(t, published[n]) for n, t in again.items())


def test_a_stage_1_checkpoint_starts_all_but_the_guidance_and_says_so():
    teacher, student = models()
    published = {
        n.removeprefix("stage1_pretrained_CLIP."): t
        for n, t in published_stage2(student, teacher).items()
        if n.startswith("stage1_pretrained_CLIP.")
    }
    account = load_matching(
        student, initial_state(published, "m3d.bin", "hsenet", (4, 8, 8), (2, 2, 2)), "m3d.bin"
    )
    assert "left at their start" in account and "vision.guidance" in account and "not used" not in account
    assert torch.equal(student.vision.blocks[0].attn.qkv.weight, teacher.vision.blocks[0].attn.qkv.weight)


def test_guidance_weighs_patches_before_the_class_token_joins():
    _, student = models()
    vision, batch = student.vision, double(data())
    seen = []
    vision.blocks[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        vision(batch.volume, batch.slices)
        patches = vision.embed(batch.volume)
        scores = vision.patch_scores(patches, batch.slices)
    assert ((scores > 0) & (scores < 1)).all()
    assert torch.allclose(seen[0][:, 1:], patches * scores[..., None]) and torch.equal(
        seen[0][0, 0], vision.cls_token[0, 0]
    )


def test_base_stage_2_has_the_published_sizes():
    with torch.device("meta"):
        model = build_dual_encoder(ClipConfig(vision=GuidedVisionConfig()))
    assert isinstance(model.vision, ViT2E3) and model.vision.guidance.key.weight.shape == (768, 768)
    assert model.vision.guidance.dropout.p == 0.1 and model.vision.guidance.norm.eps == 1e-5


def test_stage_1_is_the_contrastive_loss_alone():
    torch.manual_seed(0)
    model, batch = build_dual_encoder(TINY), replace(data(), slices=None)
    outputs = encode(model, batch)
    assert torch.equal(
        Contrastive().loss(outputs, batch, 0)[0], contrastive_loss(contrastive_logits(*outputs))
    )
