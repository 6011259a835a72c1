"""The programs that benchmarks/clients.py runs: each package in its own way, on synthetic data."""

from __future__ import annotations

import random
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["CLIENTS", "Client"]


class Client(ABC):
    """A program: how it trains, how its model is used, and a piece of it to be checked."""

    package: str
    program: str
    """What is run, in words for the table."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def train(self) -> float:
        """Make a model, train it the way the package does, and say how well it went."""

    @abstractmethod
    def use(self) -> object:
        """What the trained model is for."""

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The trained model."""

    @abstractmethod
    def probe(self, model: nn.Module, dtype: torch.dtype) -> Tensor:
        """An output of ``model`` on fixed input of ``dtype``, by the package's own forward pass."""


class DeepAR(Client):
    package = "gluonts"
    program = "DeepAR, 40 hourly series: 2-layer LSTM of 40, batch 32, context 72, horizon 24"

    def train(self) -> float:
        from gluonts.dataset.common import ListDataset
        from gluonts.torch import DeepAREstimator

        rng = np.random.default_rng(0)
        hours = np.arange(1500)
        series = [
            10 + 5 * np.sin(hours * 2 * np.pi / 24 + phase) + rng.normal(0, 1, len(hours))
            for phase in rng.uniform(0, 6, 40)
        ]
        data = [{"start": "2020-01-01 00:00", "target": values} for values in series]
        self.data = ListDataset(data, freq="h")
        losses = RecordedLoss()
        estimator = DeepAREstimator(
            freq="h",
            prediction_length=24,
            context_length=72,
            batch_size=32,
            num_batches_per_epoch=30,
            trainer_kwargs={
                "max_epochs": 2,
                "accelerator": "cpu",
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": self.folder,
                "callbacks": [losses.callback()],
            },
        )
        self.predictor = estimator.train(self.data)
        return losses.last

    def use(self) -> object:
        return [forecast.mean for forecast in self.predictor.predict(self.data)]

    @property
    def model(self) -> nn.Module:
        return self.predictor.prediction_net.model

    def probe(self, model: nn.Module, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        inputs = {}
        for name, kind in model.describe_inputs(16).items():
            shape = kind.shape
            if kind.dtype == torch.long:
                inputs[name] = torch.zeros(shape, dtype=torch.long)
            else:
                inputs[name] = torch.rand(shape, generator=generator).to(dtype) + 0.5
        future = torch.rand(16, model.prediction_length, generator=generator).to(dtype)
        params, *_ = model.unroll_lagged_rnn(**inputs, future_target=future)
        return torch.stack(params)


class RecordedLoss:
    """The training loss of Lightning's last epoch."""

    last = float("nan")

    def callback(self):
        from lightning.pytorch.callbacks import Callback

        recorded = self

        class Recorder(Callback):
            def on_train_epoch_end(self, trainer, module) -> None:
                recorded.last = float(trainer.callback_metrics["train_loss"])

        return Recorder()


class RecurrentPPO(Client):
    package = "sb3-contrib"
    program = "RecurrentPPO on CartPole: two LSTMs of 256, 8 environments, 128 steps a rollout"

    def train(self) -> float:
        from sb3_contrib import RecurrentPPO as Algorithm
        from stable_baselines3.common.env_util import make_vec_env

        self.environments = make_vec_env("CartPole-v1", n_envs=8, seed=0)
        self.algorithm = Algorithm(
            "MlpLstmPolicy", self.environments, n_steps=128, n_epochs=4, seed=0, device="cpu"
        )
        self.algorithm.learn(2 * 8 * 128)
        return float(self.algorithm.logger.name_to_value["train/loss"])

    def use(self) -> object:
        observations, states = self.environments.reset(), None
        starts = np.ones(8, dtype=bool)
        for _ in range(200):
            actions, states = self.algorithm.predict(
                observations, states, episode_start=starts, deterministic=True
            )
            observations, _, starts, _ = self.environments.step(actions)
        return observations

    @property
    def model(self) -> nn.Module:
        return self.algorithm.policy

    def probe(self, model: nn.Module, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(8 * 64, 4, generator=generator).to(dtype)
        starts = torch.zeros(8 * 64, dtype=dtype)
        starts[100] = 1
        outputs = []
        for name in ("actor", "critic"):
            lstm = getattr(model, f"lstm_{name}")
            state = torch.zeros(lstm.num_layers, 8, lstm.hidden_size, dtype=dtype)
            latent, _ = model._process_sequence(features, (state, state), starts, lstm)
            outputs.append(getattr(model.mlp_extractor, f"forward_{name}")(latent))
        return torch.cat([model.action_net(outputs[0]), model.value_net(outputs[1])], 1)


class CudaLSTM(Client):
    package = "neuralhydrology"
    program = "CudaLSTM, 4 basins of daily weather: LSTM of 128, batch 256, 365 days"

    def train(self) -> float:
        from neuralhydrology.training.basetrainer import BaseTrainer
        from neuralhydrology.utils.config import Config

        folder = Path(tempfile.mkdtemp(dir=self.folder))
        self.write_basins(folder)
        self.config = Config(
            {
                "experiment_name": "rain",
                "run_dir": folder,
                "train_basin_file": folder / "basins.txt",
                "validation_basin_file": folder / "basins.txt",
                "test_basin_file": folder / "basins.txt",
                "train_start_date": "01/01/2001",
                "train_end_date": "31/12/2001",
                "validation_start_date": "01/01/2001",
                "validation_end_date": "31/12/2001",
                "test_start_date": "01/01/2001",
                "test_end_date": "31/12/2001",
                "device": "cpu",
                "model": "cudalstm",
                "head": "regression",
                "hidden_size": 128,
                "initial_forget_bias": 3,
                "output_dropout": 0.4,
                "optimizer": "Adam",
                "loss": "MSE",
                "learning_rate": {0: 1e-3},
                "batch_size": 256,
                "epochs": 1,
                "clip_gradient_norm": 1,
                "predict_last_n": 1,
                "seq_length": 365,
                "num_workers": 0,
                "validate_every": 0,
                "metrics": ["NSE"],
                "dataset": "generic",
                "data_dir": folder,
                "dynamic_inputs": ["rain", "temperature", "radiation", "wind", "humidity"],
                "target_variables": ["discharge"],
                "seed": 0,
                "log_tensorboard": False,
                "verbose": 0,
            }
        )
        self.trainer = BaseTrainer(self.config)
        self.trainer.initialize_training()
        losses = []
        summarise = self.trainer.experiment_logger.summarise

        def recorded():
            losses.append(summarise())
            return losses[-1]

        self.trainer.experiment_logger.summarise = recorded
        self.trainer.train_and_validate()
        return float(losses[-1]["avg_total_loss"])

    @staticmethod
    def write_basins(folder: Path) -> None:
        """Weather of two years, and discharge that remembers the rain."""
        import pandas as pd

        rng = np.random.default_rng(0)
        days = pd.date_range("2000-01-01", "2001-12-31", name="date")
        (folder / "time_series").mkdir()
        names = [f"basin{n}" for n in range(4)]
        (folder / "basins.txt").write_text("\n".join(names))
        for name in names:
            rain = rng.gamma(0.5, 5.0, len(days)).astype(np.float32)
            table = pd.DataFrame({"rain": rain}, index=days)
            for other in ("temperature", "radiation", "wind", "humidity"):
                table[other] = rng.normal(size=len(days)).astype(np.float32)
            table["discharge"] = table["rain"].ewm(span=20).mean().astype(np.float32)
            table.to_xarray().to_netcdf(folder / "time_series" / f"{name}.nc")

    def use(self) -> object:
        from neuralhydrology.evaluation import get_tester

        tester = get_tester(
            cfg=self.config, run_dir=self.config.run_dir, period="test", init_model=False
        )
        return tester.evaluate(save_results=False, metrics=["NSE"], model=self.model)

    @property
    def model(self) -> nn.Module:
        return self.trainer.model

    def probe(self, model: nn.Module, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        names = self.config.dynamic_inputs
        x = {n: torch.randn(16, 100, 1, generator=generator).to(dtype) for n in names}
        return model({"x_d": x})["y_hat"]


class JoeyNMT(Client):
    package = "joeynmt"
    program = "translation: bidirectional GRU and GRU with Bahdanau attention of 128, batch 32"

    WORDS = [f"w{n}" for n in range(500)]

    def train(self) -> float:
        import joeynmt.training as training
        from joeynmt.config import parse_global_args
        from joeynmt.model import Model
        from joeynmt.prediction import prepare

        folder = Path(tempfile.mkdtemp(dir=self.folder))
        rng = random.Random(0)
        for name, count in (("train", 640), ("dev", 64)):
            sentences = [rng.choices(self.WORDS, k=rng.randint(5, 25)) for _ in range(count)]
            for side, step in (("de", 1), ("en", -1)):
                lines = (" ".join(words[::step]) for words in sentences)
                (folder / f"{name}.{side}").write_text("".join(f"{line}\n" for line in lines))
        (folder / "words").write_text("".join(f"{word}\n" for word in self.WORDS))
        (folder / "run").mkdir()
        side = {"level": "word", "voc_file": str(folder / "words"), "voc_limit": 1000}
        embeddings = {"embeddings": {"embedding_dim": 128}, "hidden_size": 128}
        config = {
            "name": "reversal",
            "model_dir": str(folder / "run"),
            "use_cuda": False,
            "random_seed": 0,
            "data": {
                "train": str(folder / "train"),
                "dev": str(folder / "dev"),
                "dataset_type": "plain",
                "src": {"lang": "de", **side},
                "trg": {"lang": "en", **side},
            },
            "training": {
                "batch_size": 32,
                "epochs": 1,
                "learning_rate": 1e-3,
                "scheduling": "exponential",
                "validation_freq": 20,
                "logging_freq": 20,
                "shuffle": True,
            },
            "testing": {"beam_size": 1, "eval_metrics": ["bleu"], "batch_size": 32},
            "model": {
                "encoder": {"type": "recurrent", "rnn_type": "gru", "bidirectional": True,
                            "num_layers": 1, **embeddings},
                "decoder": {"type": "recurrent", "rnn_type": "gru", "attention": "bahdanau",
                            "num_layers": 1, "init_hidden": "bridge", **embeddings},
            },
        }  # fmt: skip
        arguments = parse_global_args(config, rank=0, mode="train")
        self._model, data, dev, _ = prepare(arguments, rank=0, mode="train")
        assert isinstance(self._model, Model)
        trainer = training.TrainManager(
            model=self._model,
            model_dir=arguments.model_dir,
            device=arguments.device,
            n_gpu=0,
            rank=0,
            num_workers=0,
            autocast=arguments.autocast,
            seed=arguments.seed,
            train_args=arguments.train,
            dev_args=arguments.test,
        )
        trainer.train_and_validate(train_data=data, valid_data=dev)
        return float(trainer.stats.best_ckpt_score)

    def batch(self):
        """Sentences without end, so that the search goes on to its limit."""
        generator = torch.Generator().manual_seed(0)
        lengths = torch.arange(32, 0, -1).clamp(min=8)
        src = torch.randint(4, 500, (32, 32), generator=generator)
        src[torch.arange(32) >= lengths.unsqueeze(1)] = self._model.pad_index
        trg = torch.randint(4, 500, (32, 20), generator=generator)
        return src, lengths, (src != self._model.pad_index).unsqueeze(1), trg

    def use(self) -> object:
        from joeynmt.search import greedy

        src, lengths, mask, _ = self.batch()
        self._model.eval()
        with torch.no_grad():
            output, hidden, _, _ = self._model(
                return_type="encode", src=src, src_length=lengths, src_mask=mask
            )
            return greedy(
                src_mask=mask,
                max_output_length=40,
                min_output_length=40,
                model=self._model,
                encoder_output=output,
                encoder_hidden=hidden,
                generate_unk=True,
                return_attention=False,
                return_prob="none",
                repetition_penalty=-1,
                no_repeat_ngram_size=-1,
                encoder_input=src,
            )

    @property
    def model(self) -> nn.Module:
        return self._model

    def probe(self, model: nn.Module, dtype: torch.dtype) -> Tensor:
        src, lengths, mask, trg = self.batch()
        output, *_ = model._encode_decode(
            src=src, trg_input=trg, src_mask=mask, src_length=lengths, trg_mask=mask
        )
        return output


CLIENTS = {cls.package: cls for cls in (DeepAR, RecurrentPPO, CudaLSTM, JoeyNMT)}
