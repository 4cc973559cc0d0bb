"""A small Hub on this machine: it speaks the Hugging Face Hub's protocol, so the real clients work against it unchanged.

    python -m pipeline.local_hub --root outputs/hub            (or: make hub)

prints the environment to export; with it `hf`, `from_pretrained`, `load_dataset`, `push_to_hub` and `snapshot_download`
read and write here instead of huggingface.co. Quickstart, the tests and an office without internet use it.

What lies on disk is ordinary: ROOT/models/OWNER/NAME/repo.git is a bare git repository with its large files in git-lfs's
own layout, so `git log`, `git fsck` and a backup by copying work on it.

    errors <- git <- store <- accounts <- web <- {spaces, repos, files, lfs, commits} <- app <- __main__; process runs that
    faults: a switch for tests, off unless a server is started with it

Not spoken: Xet (the printed environment switches it off), pull requests, gated repositories, git over HTTP.
"""
