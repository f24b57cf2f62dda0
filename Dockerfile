# CPU and GPU: on Linux, pip's torch brings its CUDA libraries with it.
FROM python:3.11-slim
# MuJoCo and Box2D render without a display.
RUN apt-get update && apt-get install -y --no-install-recommends git make g++ swig libegl1 libgl1 && rm -rf /var/lib/apt/lists/*
WORKDIR /levin
COPY . .
RUN make setup
CMD ["make", "train", "ALGO=sac", "ENV=pendulum", "STEPS=20000"]
