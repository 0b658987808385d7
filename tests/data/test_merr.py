import json

import pytest

from common.config import UserError
from data.merr import load_merr
from data.prompts import EMOTIONS9


@pytest.fixture
def root(tmp_path):
    """The published layout with three clips: two of the coarse list, one of them in the fine JSON too."""
    (tmp_path / "MERR_coarse_grained.txt").write_text("sample_00000003 43 happy\nsamplenew_00000047\t22\tsurprise\n")
    (tmp_path / "relative_test3_NCEV.txt").write_text("samplenew_00006611 125 sad -10\n")
    coarse = {"sample_00000003": {"caption": "He smiles.", "peak_index": "12", "AU_list": ["AU06"], "text": "Hi"}}
    fine = {"samplenew_00000047": {"smp_reason_caption": "Her jaw drops.", "caption": "c", "peak_index": "01"}}
    (tmp_path / "MERR_coarse_grained.json").write_text(json.dumps(coarse))
    (tmp_path / "MERR_fine_grained.json").write_text(json.dumps(fine))
    (tmp_path / "transcription_en_all.csv").write_text(
        'name,sentence\nsample_00000003,"Well, then."\nsamplenew_00006611,\nsamplenew_00000047,nan\n'
    )
    (tmp_path / "video").mkdir()
    for name in ("sample_00000003.avi", "sample_00000003.mp4", "samplenew_00000047.AVI", "notes.txt"):
        (tmp_path / "video" / name).touch()
    return tmp_path


def message(*args, **options):
    with pytest.raises(UserError) as error:
        load_merr(*args, **options)
    return str(error.value).replace(f"{args[0]}/", "")


def test_published_layout(root):
    clips, listing = load_merr(root, "MERR_coarse_grained.txt", labels=EMOTIONS9)
    happy, surprise = clips
    assert (happy.id, happy.label, happy.text, happy.frame) == ("sample_00000003", "happy", "Well, then.", 12)
    assert happy.path == str(root / "video/sample_00000003.mp4")  # before .avi
    assert happy.captions == {"reason": "He smiles."}
    assert happy.where == f"{root}/MERR_coarse_grained.txt:1"
    assert (surprise.label, surprise.text, surprise.frame) == ("surprise", None, 1)  # "nan" is no sentence
    assert surprise.path == str(root / "video/samplenew_00000047.AVI")
    assert surprise.captions == {"reason_v2": "Her jaw drops."}
    assert (listing.listed, listing.found, listing.skipped, listing.expected) == (2, 2, [], 28_618)
    assert str(listing).endswith("MERR_coarse_grained.txt: 2 listed (the published list has 28,618), 2 used")


def test_only_needed_videos_are_missed(root):
    clips, listing = load_merr(root, "relative_test3_NCEV.txt")
    assert (clips[0].path, clips[0].text, clips[0].captions, clips[0].frame) == (None, None, {}, None)
    assert (listing.found, listing.expected) == (1, 834)
    clips, listing = load_merr(root, "relative_test3_NCEV.txt", need_video=True)
    assert clips == []
    assert listing.skipped == [("samplenew_00006611", "no video")]
    assert str(listing).endswith("0 used, 1 skipped (first: samplenew_00006611: no video)")


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ("x sad", "sad"),
        ("x 43", None),
        ("x 43 sad", "sad"),
        ("x 43 sad -0.61232674", "sad"),
        ("x\t43\tsad\t-10\r", "sad"),
    ],
)
def test_list_columns(tmp_path, row, label):
    (tmp_path / "list.txt").write_text(f"\ufeff{row}\n\n")
    assert [(clip.id, clip.label) for clip in load_merr(tmp_path, "list.txt")[0]] == [("x", label)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a 1 sad\nb 2 happi\n", "list.txt:2: unknown label 'happi' (nearest: happy; labels: happy, sad)"),
        ("a 1 Sad\n", "list.txt:1: unknown label 'Sad' (nearest: sad; labels: happy, sad)"),
        ("a 1 x\n", "list.txt:1: unknown label 'x' (labels: happy, sad)"),
        ("a\n", "list.txt:1: 1 columns; a row is: name frame_count label [valence]"),
        ("\na 1 sad 0 9\n", "list.txt:2: 5 columns; a row is: name frame_count label [valence]"),
        ("a sad 1\n", "list.txt:1: frame count 'sad' is not a whole number"),
        ("\n", "list.txt: no rows"),
    ],
)
def test_list_mistakes_name_file_and_line(tmp_path, text, said):
    (tmp_path / "list.txt").write_text(text)
    assert message(tmp_path, "list.txt", labels=["happy", "sad"]) == said


def test_a_name_listed_twice_is_used_once(tmp_path):
    (tmp_path / "list.txt").write_text("a 1 sad\nb 1 sad\na 1 happy\n")
    clips, listing = load_merr(tmp_path, "list.txt")
    assert [(clip.id, clip.label) for clip in clips] == [("a", "sad"), ("b", "sad")]
    assert listing.skipped == [("a", "listed again in line 3")]


@pytest.mark.parametrize(
    ("fields", "captions"),
    [
        ({"smp_reason_caption": "new", "reason_caption": "old"}, {"reason_v2": "new"}),
        ({"reason_caption": "old"}, {"reason_v2": "old"}),
        ({"smp_reason_caption": " ", "reason_caption": "old"}, {"reason_v2": "old"}),
        ({"smp_reason_caption": None, "peak_index": ""}, {}),
        ({"smp_reason_caption": float("nan"), "peak_index": None}, {}),
        ({"smp_reason_caption": "nan"}, {}),
    ],
)
def test_fine_captions_of_all_generations(tmp_path, fields, captions):
    (tmp_path / "list.txt").write_text("a 1 sad\n")
    (tmp_path / "0512_target_smp_end.json").write_text(json.dumps({"a": fields}))
    (clip,) = load_merr(tmp_path, "list.txt")[0]
    assert (clip.captions, clip.frame) == (captions, None)


def test_fine_peak_goes_before_coarse(tmp_path):
    (tmp_path / "list.txt").write_text("a 1\nb 1\n")
    peaks = {"a": {"peak_index": 4}, "b": {"peak_index": "5"}}
    (tmp_path / "AU_filter_merge.json").write_text(json.dumps(peaks))
    (tmp_path / "MERR_fine_grained.json").write_text(json.dumps({"a": {"peak_index": "0"}}))
    assert [clip.frame for clip in load_merr(tmp_path, "list.txt")[0]] == [0, 5]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": {}},\n', "MERR_coarse_grained.json:1: not JSON (Extra data)"),
        ('{"a":\n{', "MERR_coarse_grained.json:2: not JSON (Expecting property name enclosed in double quotes)"),
        ("[]", "MERR_coarse_grained.json: must be a JSON object of video name -> entry, not a list"),
        ('{"a": "x"}', "MERR_coarse_grained.json: entry 'a' is not a JSON object"),
        ('{"a": {"caption": ["x"]}}', "MERR_coarse_grained.json: entry 'a': caption must be text"),
        ('{"a": {"peak_index": "x"}}', "MERR_coarse_grained.json: entry 'a': peak_index 'x' is not a frame number"),
    ],
)
def test_json_mistakes(tmp_path, text, said):
    (tmp_path / "list.txt").write_text("a 1 sad\n")
    (tmp_path / "MERR_coarse_grained.json").write_text(text)
    assert message(tmp_path, "list.txt") == said


def test_transcripts_of_both_years(tmp_path):
    (tmp_path / "list.txt").write_text("a 1\nb 1\nc 1\nd 1\n")
    # pandas wrote its index; `sentence` is the Chinese of some copies; c is empty and d has no row
    text = ",name,sentence,sentence_en\n0,a,你好, Hello \n1,b,再见,\n2,a,x,twice\n3,c,NaN,\n"
    (tmp_path / "transcription_all_new.csv").write_text(text)
    assert [clip.text for clip in load_merr(tmp_path, "list.txt")[0]] == [" Hello ", "再见", None, None]


def test_transcript_mistakes(root):
    (root / "t.csv").write_text("name,text\na,b\n")
    said = "t.csv:1: no column 'sentence' or 'sentence_en' (found: name, text)"
    assert message(root, "MERR_coarse_grained.txt", transcript="t.csv") == said
    (root / "t.csv").write_text("id,sentence\na,b\n")
    assert (
        message(root, "MERR_coarse_grained.txt", transcript="t.csv")
        == "t.csv:2: no column 'name' (found: id, sentence)"
    )


def test_missing_files_are_errors_only_when_named(root, monkeypatch):
    monkeypatch.chdir(root / "video")
    said = "annotation_file 'none.txt' not found (looked for none.txt and none.txt)"  # message() cuts the root off
    assert message(root, "none.txt") == said
    for option in ("transcript", "coarse", "fine", "image_path"):
        said = f"{option} 'none' not found (looked for none and none)"
        assert message(root, "MERR_coarse_grained.txt", **{option: "none"}) == said
    (root / "video").rename(root / "moved")
    assert load_merr(root, "MERR_coarse_grained.txt")[0][0].path is None
    assert message(root, "MERR_coarse_grained.txt", need_video=True) == (
        "video folder video not found (another place: --image-path)"
    )
    clips, _ = load_merr(root, "MERR_coarse_grained.txt", image_path="moved")
    assert clips[0].path == str(root / "moved/sample_00000003.mp4")


def test_absolute_names(root):
    clips, listing = load_merr(str(root), str(root / "MERR_coarse_grained.txt"), image_path=str(root / "video"))
    assert [clip.id for clip in clips] == ["sample_00000003", "samplenew_00000047"]
    assert listing.expected == 28_618
    missing = str(root / "none.txt")
    with pytest.raises(UserError, match=f"^annotation_file '{missing}' not found .looked for {missing}.$"):
        load_merr(root, missing)
