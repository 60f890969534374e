"""Quantization calibrated on judging: a method is one file, named as it is on the command line, with its command last;
`pack` stands on the command line by itself.

gptq and gguf walk a checkpoint layer by layer (decoder, batches, stream, sensitivity) over a judge's transcripts
(calibration); onnx, bnb and pack need none. May import gramlite.export, and of gramlite all but the commands.
"""
