"""A small run in an output folder, for tests of the folder's protocol."""

from reattend.workdir import Workdir, digest

PRINT = {"weights": "w", "plan": "p"}


def tree(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def small_run(out, fingerprint=PRINT, overwrite=False, ran=None):
    """Three stages, one of which depends on the plan; returns the state it started from."""
    with Workdir.open(out, fingerprint, overwrite) as work:
        if work.state == "complete":
            return work.state
        start = work.state
        for stage, needs in (("stats", "weights"), ("solve", "plan")):
            inputs = digest([stage, fingerprint[needs]])
            if not work.has(stage, inputs):
                if ran is not None:
                    ran.append(stage)
                work.publish_json(f"work/{stage}.json", {"of": fingerprint[needs]})
                work.publish_bytes(f"{stage}.bin", fingerprint[needs].encode() * 50)
                work.mark(stage, inputs)
        work.publish_bytes("run.json", b"{}")
        work.finish()
        return start
