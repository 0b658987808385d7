import csv
import functools
import io
import json
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from common import config
from common.config import UserError
from data import gottalent
from data.gottalent import Config, class_names, emonet, gottalent_clips, script_id, split_of
from data.manifest import leak_check, read_manifest
from data.media import load_audio

ANGER, FEAR = "anger_rage_fury_hatred_and_annoyance", "fear_dread_apprehension_and_horror"
# how the published tars name the 40 emotions, in the order of the classes
PUBLISHED = """
    sympathy_compassion_warmth_trust_and_tenderness
    lighthearted_fun_amusement_mirth_joviality_laughter_and_playfulness anger_rage_fury_hatred_and_annoyance
    astonishment_surprise_amazement_and_shock awe_wonder_and_an_awestruck_feeling
    bitterness_resentment_acrimony_cynicism_and_rancor concentration_focus_engrossment_and_absorption
    confusion_bewilderment_disorientation_and_perplexity contemplation_reflection_meditation_and_pondering
    contempt_disdain_loathing_and_detestation
    contentment_relaxation_peacefulness_calmness_satisfaction_and_serenity disappointment_regret_and_dismay
    disgust_revulsion_abhorrence_and_loathing distress_worry_anxiety_anguish_and_trepidation
    doubt_distrust_suspicion_skepticism_and_uncertainty
    happiness_excitement_joy_exhilaration_delight_jubilation_and_bliss
    embarrassment_shyness_mortification_and_self-consciousness numbness_detachment_insensitivity_and_apathy
    fatigue_weariness_lethargy_and_burnout fear_dread_apprehension_and_horror
    helplessness_powerlessness_desperation_and_submission hope_enthusiasm_optimism_anticipation_and_courage
    impatience_irritability_restlessness_and_short-temperedness
    infatuation_having_a_crush_romantic_desire_and_butterflies_in_the_stomach
    interest_fascination_curiosity_and_intrigue intoxication_stupor_altered_perception_and_being_drunk
    jealousy_envy_and_covetousness yearning_longing_and_craving_with_wistfulness
    malevolence_spite_sadism_malice_and_schadenfreude physical_pain_suffering_torment_and_agony
    ecstasy_pleasure_bliss_rapture_and_beatitude pride_dignity_self-confidence_and_honor
    relief_solace_comfort_and_liberation sadness_sorrow_grief_melancholy_and_heartache sexual_lust_and_carnal_desire
    shame_guilt_remorse_humiliation_and_contrition sourness_tartness_and_acidity teasing_bantering_and_playful_mocking
    thankfulness_gratitude_appreciation_and_gratefulness triumph_and_feelings_of_superiority
""".split()


@functools.cache
def mp3(hertz=440):
    """Half a second of a tone at 24 kHz."""
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp3") as container:
        stream = container.add_stream("libmp3lame", rate=24000, layout="mono")
        tone = 0.5 * np.sin(2 * np.pi * hertz * np.arange(12000) / 24000).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(tone[None], "fltp", "mono")
        frame.sample_rate = 24000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return sound.getvalue()


def note(text):
    """What accompanies a clip that says `text`."""
    said = f"<transcription_start>{text}</transcription_start>\n<Anger>4#Intense rage.</Anger>"
    return {"annotation": said, "flash_transcription": "heard by a machine", "duration": 0.5}


def make_tar(folder, name, members):
    """members: file name -> bytes or what becomes JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"{name}.tar", "w") as tar:
        for file, content in members.items():
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(file)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder / f"{name}.tar"


def speech(texts):
    """Members of a tar: clip 0 says the first text and so on."""
    return {f"{i}.{kind}": x for i, text in enumerate(texts) for kind, x in (("mp3", mp3()), ("json", note(text)))}


def script(split, n=0):
    """The n-th of the numbers from 0 on that, as a script, falls into a split of the default shares."""
    return [text for text in map(str, range(2000)) if split_of(script_id(text), 0.02, 0.02) == split][n]


def scripts(count, first=0):
    return [script("train", first + i) for i in range(count)]


def take(root, **options):
    clips, skipped = gottalent_clips(Config(data_root=str(root), **options))
    return clips, {reason: len(where) for reason, where in skipped.items() if where}


def refusal(root, **options):
    with pytest.raises(UserError) as error:
        take(root, **options)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{root}", "ROOT")


def test_the_published_tars_name_each_class_once():
    table = emonet("40")
    assert [table[name.split("_")[0]] for name in PUBLISHED] == class_names("40")
    assert len(class_names("40")) == 40
    with open(Path(gottalent.__file__).with_name("emonet.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    words = [word for row in rows for word in {row["label"], *row["words"].split("|")}]
    assert len(words) == len(set(words))


def test_36_classes_are_four_merges_of_the_40():
    assert len(class_names("36")) == 36
    parts = {}
    for name in class_names("40"):
        parts.setdefault(emonet("36")[name.replace("_", "")], []).append(name)
    assert [tuple(names) for names in parts.values() if len(names) > 1] == [
        ("bitterness", "sourness"), ("elation", "pleasure_ecstasy"), ("embarrassment", "shame"), ("pride", "triumph"),
    ]  # fmt: skip
    assert {name for name, of in parts.items() if len(of) == 1} == {of[0] for of in parts.values() if len(of) == 1}


def test_tars_to_manifest(tmp_path, capsys):
    fixed = make_tar(tmp_path, f"en_coral_intense_{ANGER}_vocalbursts_fixed", speech(scripts(3)))
    make_tar(tmp_path, f"english_alloy_intense_{FEAR}", speech(scripts(2, 3)))
    make_tar(tmp_path, f"de_alloy_intense_{FEAR}_vocalbursts_fixed", speech(scripts(2)))
    make_tar(tmp_path, "ADDITONAL_STUFF_voice_acting_outputs-alloy+de+", speech(scripts(1)))
    make_tar(tmp_path, "ADDITIONAL_STUFF_german_dialogue_dataset-echo", speech(scripts(1)))
    gottalent.main(Config(data_root=str(tmp_path)))
    assert capsys.readouterr().out == (
        f"{tmp_path}/manifest.csv: 5 clips, 2 voices, 2 of 36 classes, 5 scripts; train 5, valid 0, test 0\n"
        f"left out: 2 x extra tar (first: {tmp_path}/ADDITIONAL_STUFF_german_dialogue_dataset-echo.tar)\n"
        f"left out: 1 x tar of language de (first: {tmp_path}/de_alloy_intense_{FEAR}_vocalbursts_fixed.tar)\n"
    )
    clips = {clip.id: clip for clip in read_manifest(tmp_path / "manifest.csv")}
    clip = clips[f"en_coral_{ANGER}_1"]
    assert (clip.label, clip.speaker, clip.text, clip.split) == ("anger", "coral", script("train", 1), "train")
    assert clip.group == script_id(clip.text)
    assert clip.path == f"{fixed}/1.mp3"
    assert f"en_alloy_{FEAR}_0" in clips
    sound = load_audio(clip.path)
    assert abs(len(sound) - 8000) < 1200
    assert abs(float(torch.fft.rfft(sound).abs().argmax()) * 16000 / len(sound) - 440) < 5
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".tar") == ["manifest.csv"]


def test_command_line(tmp_path, monkeypatch, capsys):
    make_tar(tmp_path, f"fr_ash_intense_{ANGER}_vocalbursts_fixed", speech(scripts(1)))
    argv = f"gottalent --data-root {tmp_path} --classes 40 --languages en,fr --out {tmp_path}/out/m.csv"
    monkeypatch.setattr("sys.argv", argv.split())
    config.run(Config, gottalent.main)
    assert "1 clips, 1 voices, 1 of 40 classes" in capsys.readouterr().out
    assert read_manifest(tmp_path / "out/m.csv")[0].path.endswith("fixed.tar/0.mp3")


def test_stems_of_voices_do_not_collide_and_the_mended_tar_counts(tmp_path):
    for voice in ("alloy", "ash"):
        make_tar(tmp_path, f"en_{voice}_intense_{ANGER}_vocalbursts_fixed", speech(["Get out!"]))
    make_tar(tmp_path, f"en_ash_intense_{ANGER}", speech(["Get out!", "Leave me alone!"]))
    make_tar(tmp_path, f"english_ash_intense_{ANGER}", speech(["Get out!", "Leave me alone!"]))
    clips, skipped = take(tmp_path, test_share=0, valid_share=0)
    assert [(clip.id, clip.group) for clip in clips] == [
        (f"en_{voice}_{ANGER}_0", script_id("get out")) for voice in ("alloy", "ash")
    ]
    assert skipped == {"older tar of a voice and emotion": 2}


@pytest.mark.parametrize(
    ("annotation", "flash", "text"),
    [
        ("<transcription_start> Go\n away. </transcription_start><Fear>1#No.</Fear>", "x", "Go away."),
        ("<transcription_start>Go.</transcription</Fear>", "x", "Go."),
        ("<transcription_start>Go.<transcription_end>", "x", "Go."),
        ("<transcription_start>Go.\n<Fear>1#No.</Fear>", "Heard.", "Heard."),  # never closed: the rest is no speech
        ("<Fear>1#No.</Fear>", "Heard.", "Heard."),
        (None, "Heard\x00\ud800.", "Heard ."),
        ("", " ", None),
        (7, None, None),
    ],
)
def test_lenient_transcripts(tmp_path, annotation, flash, text):
    entry = {"annotation": annotation, "flash_transcription": flash}
    make_tar(tmp_path, f"en_ash_intense_{ANGER}", {"a.mp3": mp3(), "a.json": entry} | speech(["other"]))
    clips, skipped = take(tmp_path, test_share=0, valid_share=0)
    assert [clip.text for clip in clips if clip.id.endswith("_a")] == ([text] if text else [])
    assert skipped == ({} if text else {"no transcript": 1})


def test_scripts_are_compared_by_their_letters():
    same = ["Don't go!", "don’t  GO", "(sobbing) Don't... go?", "Don't [gasps] go", "<laughs>Don't go"]
    assert len({script_id(text) for text in same}) == 1
    assert len({script_id(text) for text in ["go", "Do not go", "(sighs)", "...", "¡Él!"]}) == 5


def test_splits_follow_the_script_and_stay_when_data_are_added(tmp_path):
    texts = [f"this is line {i}" for i in range(300)]
    first = make_tar(tmp_path, f"en_ash_intense_{ANGER}", speech(texts[:200]))
    before, _ = take(tmp_path, test_share=0.1, valid_share=0.1)
    make_tar(tmp_path, f"en_nova_intense_{FEAR}", speech(reversed(texts)))
    after, _ = take(tmp_path, test_share=0.1, valid_share=0.1)
    old = {clip.id: clip.split for clip in before}
    assert {clip.id: clip.split for clip in after if clip.id in old} == old
    parts = {name: [clip for clip in after if clip.split == name] for name in ("train", "valid", "test")}
    assert all(30 < len(parts[name]) < 75 for name in ("valid", "test"))
    for a, b in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert leak_check(parts[a], parts[b]) == []
    assert first.exists()


def test_default_shares_are_two_percent():
    splits = [split_of(script_id(f"line {i}"), 0.02, 0.02) for i in range(20000)]
    assert 320 < splits.count("test") < 480
    assert 320 < splits.count("valid") < 480


def test_held_out_voices(tmp_path):
    shared, own = scripts(2), scripts(3, 2)
    valid, test = script("valid"), script("test")
    make_tar(tmp_path, f"en_nova_intense_{ANGER}", speech([*shared, own[0], valid]))
    make_tar(tmp_path, f"en_ash_intense_{ANGER}", speech([*shared, own[1], valid, test]))
    make_tar(tmp_path, f"en_ash_intense_{FEAR}", speech([own[2], script("valid", 1)]))
    clips, skipped = take(tmp_path, test_voices=["nova"])
    assert {clip.split for clip in clips if clip.speaker == "nova"} == {"test"}
    assert sorted((clip.text, clip.split) for clip in clips if clip.speaker == "ash") == sorted(
        [(own[1], "train"), (own[2], "train"), (script("valid", 1), "valid"), (test, "test")]
    )
    assert skipped == {"script of a held-out voice": 3}
    assert refusal(tmp_path, test_voices=["nova", "Onyx"]) == "--test-voices: no Onyx here (voices: ash, nova)"
    assert refusal(tmp_path, test_voices=["nova", "ash"]).startswith("ROOT: none of 11 clips is for training; left out")


def test_unknown_emotions(tmp_path):
    make_tar(tmp_path, "en_ash_intense_hunger_and_thirst", speech(scripts(2)))
    make_tar(tmp_path, "en_ash_intense_Emotional_Numbness", speech(scripts(1)))
    clips, skipped = take(tmp_path)
    assert [clip.label for clip in clips] == ["emotional_numbness"]
    assert skipped == {"unknown emotion 'hunger'": 2}
    assert refusal(tmp_path, strict=True) == (
        "ROOT/en_ash_intense_hunger_and_thirst.tar/0.mp3: unknown emotion 'hunger' (nearest: anger)"
    )


def test_members_that_are_no_clips(tmp_path):
    members = speech(scripts(4)) | {"lone.json": note("x"), "lone.mp3.txt": b"x", "silent.mp3": mp3(), "readme": b"x"}
    path = make_tar(tmp_path, f"en_ash_intense_{ANGER}", members | {"void.mp3": b"", "void.json": note("x")})
    with tarfile.open(path, "a") as tar:
        for kind in ("mp3", "json"):
            link = tarfile.TarInfo(f"link.{kind}")
            link.type, link.linkname = tarfile.SYMTYPE, f"0.{kind}"
            tar.addfile(link)
    clips, skipped = take(tmp_path)
    assert len(clips) == 4
    assert skipped == {"JSON without audio": 1, "audio without JSON": 1, "missing or empty audio": 1}


@pytest.mark.parametrize("name", ["../../out", "/etc/out", "a/../../out", "new\nline", "sur\udcffrogate"])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    members = {f"{name}.mp3": mp3(), f"{name}.json": note("x")}
    make_tar(tmp_path, f"en_ash_intense_{ANGER}", speech(scripts(2)) | members)
    where = f"ROOT/en_ash_intense_{ANGER}.tar: "
    problem = "ROOT: 1 of 3 clips are bad, more than --max-bad 0.01: 1 x unsafe file name"
    assert refusal(tmp_path).startswith(f"{problem} (first: {where}")
    clips, skipped = take(tmp_path, max_bad=0.5)
    assert (len(clips), skipped) == (2, {"unsafe file name": 1})


def test_damage(tmp_path):
    texts = scripts(4)
    members = speech(texts) | {"bad.mp3": mp3(), "bad.json": b'{"annotation": ', "list.mp3": mp3(), "list.json": []}
    make_tar(tmp_path, f"en_ash_intense_{ANGER}", members)
    assert refusal(tmp_path) == (
        "ROOT: 2 of 6 clips are bad, more than --max-bad 0.01: 2 x JSON that cannot be read "
        f"(first: ROOT/en_ash_intense_{ANGER}.tar/bad.mp3)"
    )
    assert take(tmp_path, max_bad=0.4)[1] == {"JSON that cannot be read": 2}
    path = make_tar(tmp_path, f"en_nova_intense_{ANGER}", speech(texts))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert refusal(tmp_path, max_bad=0.4) == (
        "ROOT: 1 of 2 tars are bad, more than --max-bad 0.4: 1 x damaged tar "
        f"(first: ROOT/en_nova_intense_{ANGER}.tar: damaged tar (unexpected end of data))"
    )
    clips, skipped = take(tmp_path, max_bad=0.5)
    assert (len(clips), skipped) == (4, {"damaged tar": 1, "JSON that cannot be read": 2})
    assert not (tmp_path / "manifest.csv").exists()


def test_nothing_there(tmp_path):
    assert refusal(tmp_path / "none").startswith("ROOT: no .tar and no audio/<language>/<emotion>/manifest.jsonl")
    make_tar(tmp_path, f"fr_ash_intense_{ANGER}", speech(["x"]))
    assert refusal(tmp_path) == (
        "ROOT: none of 0 clips is for training; left out: 1 x tar of language fr "
        f"(first: ROOT/fr_ash_intense_{ANGER}.tar)"
    )


def test_unpacked_lists(tmp_path):
    texts = scripts(2)
    good = [{"file": f"audio/en/sympathy/{i}.wav", "transcript": texts[i], "label": "sympathy"} for i in (0, 1)]
    rows = [
        *good,
        good[0],
        {"file": "audio/en/sympathy/gone.wav", "transcript": "x", "label": "sympathy", "language": "en"},
        {"file": "audio/en/sympathy/0.wav", "transcript": " ", "label": "sympathy"},
        {"file": "audio/en/sympathy/0.wav", "transcript": "x", "label": "boredom"},
        {"file": "audio/en/sympathy/1.wav", "transcript": "a line\u2028of two", "label": "Hope/Enthusiasm/Optimism"}
        | {"voice": "sage"},
    ]
    for folder in ("en/sympathy", "de/anger"):
        (tmp_path / "audio" / folder).mkdir(parents=True)
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
        (tmp_path / "audio" / folder / "manifest.jsonl").write_text(text, encoding="utf-8")
    for i in (0, 1):
        (tmp_path / f"audio/en/sympathy/{i}.wav").write_bytes(b"RIFF")
    clips, skipped = take(tmp_path, classes="40", test_share=0, valid_share=0)
    assert [(clip.id, clip.label, clip.speaker, clip.text) for clip in clips] == [
        ("en_sympathy_0", "affection", None, texts[0]),
        ("en_sympathy_1", "affection", None, texts[1]),
        ("en_sage_sympathy_1", "hope_enthusiasm_optimism", "sage", "a line of two"),
    ]
    assert clips[0].path == str(tmp_path / "audio/en/sympathy/0.wav")
    assert skipped == {
        "list of language de": 1,
        "second clip of an id": 1,
        "missing or empty audio": 1,
        "row without file, transcript or label": 1,
        "unknown emotion 'boredom'": 1,
    }
    with open(tmp_path / "audio/en/sympathy/manifest.jsonl", "a") as file:
        file.write('{"file": "../../../etc/passwd", "transcript": "x", "label": "fear"}\nno JSON\n')
    assert refusal(tmp_path).startswith("ROOT: 2 of 5 clips are bad, more than --max-bad 0.01: ")
    make_tar(tmp_path, f"en_ash_intense_{ANGER}", speech(scripts(1)))
    assert take(tmp_path)[1] == {"list beside the tars": 2}
