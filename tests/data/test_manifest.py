import json

import pytest

from common.config import UserError
from data.manifest import Clip, leak_check, read_manifest, source, split_by_group, write_manifest


def manifest(folder, text, name="m.csv"):
    path = folder / name
    path.write_bytes(text.encode("utf-8"))
    return path


def message(path):
    with pytest.raises(UserError) as error:
        read_manifest(path)
    return str(error.value).replace(f"{path.parent}/", "")


def test_csv_with_bom_crlf_quotes_and_blank_lines(tmp_path):
    text = '\ufeffid,path,text,start,end,frame\r\na,v/a.mp4,"Well, ""yes""\r\nor no",0.5,2,7\r\n\r\nb,/x/b.wav,,,,\r\n'
    a, b = read_manifest(manifest(tmp_path, text))
    assert (a.id, a.path, a.text) == ("a", str(tmp_path / "v/a.mp4"), 'Well, "yes"\r\nor no')
    assert (a.start, a.end, a.frame, a.where) == (0.5, 2.0, 7, f"{tmp_path}/m.csv:2")
    # the quoted cell takes lines 2 and 3, line 4 is blank
    assert b == Clip("b", "/x/b.wav", where=f"{tmp_path}/m.csv:5")


def test_unicode_line_separators_do_not_end_a_row(tmp_path):
    (clip,) = read_manifest(manifest(tmp_path, "id,text\na,one\u2028two\x0cthree\n"))
    assert clip.text == "one\u2028two\x0cthree"
    (clip,) = read_manifest(manifest(tmp_path, '{"id": "a", "text": "one\u2028two"}\n', "m.jsonl"))
    assert clip.text == "one\u2028two"


def test_csv_and_jsonl_say_the_same(tmp_path):
    rows = [
        {"id": "1", "path": "a.wav", "label": "sad", "speaker": "s1", "fold": "2", "start": 0, "box": "1,2,3,4"},
        {"id": "2", "path": "b.png", "text": "hm", "caption": "She frowns.", "split": "test", "group": "g"},
    ]
    lines = [json.dumps(rows[0] | {"id": 1, "box": [1, 2, 3, 4], "end": float("nan"), "text": None})]
    jsonl = manifest(tmp_path, "\n".join([*lines, json.dumps(rows[1]), ""]), "m.jsonl")
    columns = ["id", "path", "label", "speaker", "fold", "start", "box", "text", "caption", "split", "group"]
    cells = [",".join(f'"{row.get(name, "")}"' for name in columns) for row in rows]
    csv = manifest(tmp_path, "\n".join([",".join(columns), *cells]))
    for one, other in zip(read_manifest(csv), read_manifest(jsonl), strict=True):
        assert vars(one) | {"where": ""} == vars(other) | {"where": ""}


def test_id_from_the_file_name_and_caption_for_both_tasks(tmp_path):
    (clip,) = read_manifest(manifest(tmp_path, "path,caption\nv/clip_3.avi,He smiles.\n"))
    assert clip.id == "clip_3"
    assert clip.captions == {"reason": "He smiles.", "reason_v2": "He smiles."}


def test_written_manifest_reads_back(tmp_path):
    clips = [
        Clip("a", str(tmp_path / "set/v/a.mp4"), 'He said, "no"', "sad", {"reason": "x", "reason_v2": "y"}, start=0.0),
        Clip("b", "/elsewhere/b.wav", label="happy", fold="3", end=1.25, frame=4),
        Clip("c", text="only words\nin two lines"),
    ]
    path = tmp_path / "set/m.csv"
    write_manifest(path, clips)
    assert [vars(clip) | {"where": ""} for clip in read_manifest(path)] == [vars(clip) for clip in clips]
    assert path.read_text().splitlines()[:2] == [
        "id,path,text,label,fold,start,end,frame,reason,reason_v2",
        'a,v/a.mp4,"He said, ""no""",sad,,0.0,,,x,y',
    ]
    assert [file.name for file in path.parent.iterdir()] == ["m.csv"]


def test_emotions_read_back_and_are_strengths(tmp_path):
    clips = [Clip("a", emotions={"happy": 2.0, "fear": 1 / 3}), Clip("b", emotions={"happy": 0.0}), Clip("c")]
    write_manifest(tmp_path / "m.csv", clips)
    assert (tmp_path / "m.csv").read_text().splitlines()[0] == "id,happy,fear"  # only the columns in use
    assert [clip.emotions for clip in read_manifest(tmp_path / "m.csv")] == [clip.emotions for clip in clips]
    assert message(manifest(tmp_path, "id,sad\na,-1\n")) == "m.csv:2: sad -1 must be finite and not negative"
    assert message(manifest(tmp_path, "id,sad\na,nan\n")) == "m.csv:2: sad nan must be finite and not negative"


def test_relative_paths_survive_a_move(tmp_path):
    write_manifest(tmp_path / "one/m.csv", [Clip("a", str(tmp_path / "one/a.wav"))])
    (tmp_path / "one").rename(tmp_path / "two")
    assert read_manifest(tmp_path / "two/m.csv")[0].path == str(tmp_path / "two/a.wav")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,text\na,b\n", "m.csv:1: no column 'id' or 'path' (found: name, text)"),
        ("id;path\na;b\n", "m.csv:1: no column 'id' or 'path' (found: id;path)"),
        ("id,id\na,b\n", "m.csv:1: a column name occurs twice (found: id, id)"),
        ("id,path\na,b\na,c\n", "m.csv:3: duplicate id 'a' (first at m.csv:2)"),
        ("id,path\n,\n", "m.csv: no clips"),
        ("id,path,text\n,,hello\n", "m.csv:2: neither id nor path is given"),
        ("id,path\na\n", "m.csv:2: 1 cells, the header has 2"),
        ("id,start\na,x\n", "m.csv:2: start 'x' is not a number"),
        ("id,start\na,-1\n", "m.csv:2: start -1 must be finite and not negative"),
        ("id,start,end\na,2,1.5\n", "m.csv:2: end 1.5 is not after start 2"),
        ("id,end\na,0\n", "m.csv:2: end 0 is not after start 0"),
        *(
            (f'id,box\na,"{box}"\n', f"m.csv:2: box '{box}' is not x1,y1,x2,y2 in pixels with x1 < x2 and y1 < y2")
            for box in ("1,2,3", "a,b,c,d", "5,0,5,9", "0,9,5,2", "0,0,inf,1", "nan,0,1,1")
        ),
        ("id,frame\na,1.5\n", "m.csv:2: frame 1.5 is not a whole number"),
        ('id,text\na,x\nb,"open\n', "m.csv:3: unexpected end of data"),
        ("", "m.csv: no clips"),
    ],
)
def test_csv_mistakes_name_file_and_line(tmp_path, text, said):
    assert message(manifest(tmp_path, text)) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"id": "a"}\n{"id": \n', "m.jsonl:2: not JSON (Expecting value at column 8)"),
        ("[1]\n", "m.jsonl:1: not a JSON object"),
        ('{"id": "a", "label": ["x"]}\n', "m.jsonl:1: label must be text, not a list"),
        ('{"id": "a"}\n\n{"text": "b"}\n', "m.jsonl:3: neither id nor path is given"),
    ],
)
def test_jsonl_mistakes_name_file_and_line(tmp_path, text, said):
    assert message(manifest(tmp_path, text, "m.jsonl")) == said


def test_files_that_are_no_manifest(tmp_path):
    assert message(tmp_path / "m.csv") == "m.csv not found"
    assert message(tmp_path / "m.xlsx") == "m.xlsx: a manifest is a .csv or .jsonl file"
    (tmp_path / "l1.csv").write_bytes(b"id,text\na,caf\xe9\n")
    assert message(tmp_path / "l1.csv") == "l1.csv: not UTF-8 text (byte 13)"


def test_unused_columns_are_named_once_on_rank_zero(tmp_path, capsys, monkeypatch):
    path = manifest(tmp_path, ",id,lable,age\n0,a,sad,3\n1,b,sad,4\n")  # the first column is a pandas index
    monkeypatch.delenv("RANK", raising=False)
    assert [clip.label for clip in read_manifest(path)] == [None, None]
    assert capsys.readouterr().err == f"{path}: columns not used: lable (nearest: label), age\n"
    monkeypatch.setenv("RANK", "1")
    read_manifest(path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("id", "video"),
    [
        ("03bSnISJMiM[12]", "03bSnISJMiM"),
        ("03bSnISJMiM$_$12", "03bSnISJMiM"),
        ("sample_00000003", "sample_00000003"),
        ("[3]", "[3]"),
    ],
)
def test_source_video_of_an_id(id, video):
    assert source(id) == video


def test_split_keeps_groups_whole():
    clips = [Clip(f"{n}", speaker=f"s{n % 24}") for n in range(480)]
    train, held = split_by_group(clips, 0.25, seed=3)
    assert len(held) == 120
    assert leak_check(train, held) == []
    assert sorted(train + held, key=clips.index) == clips
    assert train == sorted(train, key=clips.index)
    assert split_by_group(clips[::-1], 0.25, seed=3)[1] == held[::-1]  # the order of the rows does not matter
    assert split_by_group(clips, 0.25, seed=4)[1] != held


def test_split_of_uneven_groups_stays_near_the_share():
    clips = [Clip(f"v{group}[{n}]") for group in range(40) for n in range(1 + group)]
    for seed in range(20):
        held = split_by_group(clips, 0.1, seed)[1]
        assert abs(len(held) - 82) <= 20  # within half of the largest group


def test_split_extremes():
    clips = [Clip("a", group="x"), Clip("b", group="x"), Clip("c", group="y")]
    assert split_by_group(clips, 0.0, 0) == (clips, [])
    assert split_by_group(clips, 0.01, 0) == (clips[:2], clips[2:])  # the smallest group, rather than none
    for share in (0.5, 0.99):
        assert all(split_by_group(clips, share, 0))
    with pytest.raises(UserError, match=r"^nothing can be held out: all 2 clips are of one group$"):
        split_by_group(clips[:2], 0.5, 0)
    with pytest.raises(UserError, match=r"^held-out share 1.5 is not in \[0, 1\)$"):
        split_by_group(clips, 1.5, 0)


def test_leaks_are_named():
    a = [Clip("1", group="g", speaker="s"), Clip("2", dialogue="d", speaker="s"), Clip("v[1]")]
    assert leak_check(a, [Clip("3", dialogue="d"), Clip("v[2]"), Clip("4", speaker="s")]) == ["d", "v"]
