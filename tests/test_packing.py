"""The layout of `llama::quantized_moe_ffn`: bytes written out by hand, and an unpacker that shares nothing."""

import struct

import numpy as np
import pytest
import torch

from mobilemoe.export.packing import expand_rows, operator_rows, pack_experts, pack_universal
from modeling_mobilemoe import quantize
from modeling_mobilemoe.int4_mobilemoe import Int4Format, dequantize_tensor, unpack_int4


def unpack_universal(blob: np.ndarray, rows: int, columns: int, group_size: int, num_bits: int):
    """Reads one expert back, value by value, from the description of the layout; shares nothing with the packer."""
    header = blob[:64].view(np.int32)
    assert header.tolist() == [6712, 1, num_bits, 0, 0, 8, 16, 2] + [0] * 8
    quantized = np.zeros((rows, columns), dtype=np.int32)
    scale = np.zeros((rows, columns // group_size), dtype=np.float32)
    cursor = 64
    for panel in range(0, rows, 8):
        for group in range(columns // group_size):
            values = []
            while len(values) < group_size * 8:
                if num_bits == 8:
                    values.append(int(blob[cursor].view(np.int8)))
                    cursor += 1
                else:
                    block = blob[cursor : cursor + 16]
                    values += [int(byte & 15) - 8 for byte in block] + [int(byte >> 4) - 8 for byte in block]
                    cursor += 16
            scales = blob[cursor : cursor + 32].view(np.float32)
            sums = blob[cursor + 32 : cursor + 64].view(np.int32)
            cursor += 64
            row_sums = [0] * 8
            for index, value in enumerate(values):
                # 16 columns by 8 rows at a time; within them [half of 8 columns][row][column].
                chunk, rest = divmod(index, 128)
                half, rest = divmod(rest, 64)
                row, column = divmod(rest, 8)
                row_sums[row] += value
                if panel + row < rows:
                    quantized[panel + row, group * group_size + chunk * 16 + half * 8 + column] = value
            assert row_sums == sums.tolist()
            for row in range(min(8, rows - panel)):
                scale[panel + row, group] = scales[row]
    assert cursor == len(blob)
    return quantized, scale


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(24, 96, 32), (20, 64, 16), (3, 32, 32), (8, 128, 64)])
def test_packed_experts_read_back(rows, columns, group_size, num_bits):
    generator = torch.Generator().manual_seed(0)
    limit = 2 ** (num_bits - 1)
    quantized = torch.randint(-limit, limit, (2, rows, columns), generator=generator).to(torch.int8)
    scale = torch.rand((2, rows, columns // group_size), generator=generator)
    packed = pack_universal(quantized, scale, num_bits).numpy()
    for expert in range(2):
        read, read_scale = unpack_universal(packed[expert], rows, columns, group_size, num_bits)
        assert np.array_equal(read, quantized[expert].numpy())
        assert np.array_equal(read_scale, scale[expert].numpy())


def test_packed_bytes_written_by_hand():
    # One row of 16 columns, 0 to 7 then -8 to -1; the seven padding rows hold zeros (stored as 8).
    quantized = torch.tensor([[[0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1]]], dtype=torch.int8)
    packed = pack_universal(quantized, torch.tensor([[[0.5]]]), 4)[0].tolist()
    # A byte holds values i and i + 16 of each 32: row 0 with row 2, row 1 with row 3, in each half of the columns.
    first_half = [0x88, 0x89, 0x8A, 0x8B, 0x8C, 0x8D, 0x8E, 0x8F] + [0x88] * 24
    second_half = [0x80, 0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87] + [0x88] * 24
    scales = [0, 0, 0, 0x3F] + [0] * 28
    sums = [0xF8, 0xFF, 0xFF, 0xFF] + [0] * 28
    assert packed[64:] == first_half + second_half + scales + sums


@pytest.mark.parametrize("num_bits", [4, 8])
def test_experts_along_the_input_go_through_unchanged(tiny_model, num_bits):
    quantize(tiny_model, Int4Format("input"))
    experts = tiny_model.model.layers[1].feed_forward.experts
    gate_up, down, _, noise = pack_experts(experts, num_bits)
    assert noise == 0
    for packed, qweight, scale in (
        (gate_up, experts.gate_up_qweight, experts.gate_up_scale),
        (down, experts.down_qweight, experts.down_scale),
    ):
        for expert in range(experts.num_experts):
            rows, columns = qweight.shape[2] * 2, qweight.shape[1]
            read, read_scale = unpack_universal(packed[expert].numpy(), rows, columns, 32, num_bits)
            assert np.array_equal(read, unpack_int4(qweight[expert]).T.numpy())
            assert np.array_equal(read_scale, scale[expert].float().T.numpy())


def test_int8_bytes_written_by_hand():
    # One row, two groups of 16: 1 to 16, then -1 to -16. A panel has eight rows, seven of them padding.
    row = torch.cat([torch.arange(1, 17), -torch.arange(1, 17)]).to(torch.int8)
    packed = bytes(pack_universal(row.view(1, 1, 32), torch.tensor([[[0.25, 2.0]]]), 8)[0].tolist())
    padding = bytes(56)
    first = bytes(range(1, 9)) + padding + bytes(range(9, 17)) + padding
    second = bytes(256 - k for k in range(1, 9)) + padding + bytes(256 - k for k in range(9, 17)) + padding
    assert packed == b"".join(
        [
            struct.pack("<16i", 6712, 1, 8, 0, 0, 8, 16, 2, *[0] * 8),
            first + struct.pack("<8f", 0.25, *[0] * 7) + struct.pack("<8i", 136, *[0] * 7),
            second + struct.pack("<8f", 2.0, *[0] * 7) + struct.pack("<8i", -136, *[0] * 7),
        ]
    )


def test_two_panels_written_by_hand():
    # Nine rows of sixteen equal values, -4 to 4: -4 is the nibble 4, 4 the nibble 12. Two panels: eight rows, one.
    quantized = torch.arange(-4, 5, dtype=torch.int8).view(1, 9, 1).expand(1, 9, 16)
    packed = bytes(pack_universal(quantized, torch.arange(1.0, 10.0).view(1, 9, 1), 4)[0].tolist())
    # Rows 0 and 2 share a byte, 1 and 3, 4 and 6, 5 and 7: eight columns each, then the other eight columns.
    half = bytes([0x64] * 8 + [0x75] * 8 + [0xA8] * 8 + [0xB9] * 8)
    last = bytes([0x8C] * 8 + [0x88] * 24)
    assert packed[64:] == b"".join(
        [
            half * 2 + struct.pack("<8f", *range(1, 9)) + struct.pack("<8i", *(16 * row for row in range(-4, 4))),
            last * 2 + struct.pack("<8f", 9, *[0] * 7) + struct.pack("<8i", 64, *[0] * 7),
        ]
    )


@pytest.mark.parametrize(("num_bits", "at_least_db"), [(8, 40), (4, 15)])
def test_loss_of_crossing_the_axis_is_measured(tiny_model, num_bits, at_least_db):
    quantize(tiny_model)
    experts = tiny_model.model.layers[0].feed_forward.experts
    gate_up, _, signal, noise = pack_experts(experts, num_bits)
    expected_signal = expected_noise = 0.0
    for qweight, scale in (
        (experts.gate_up_qweight, experts.gate_up_scale),
        (experts.down_qweight, experts.down_scale),
    ):
        weight = dequantize_tensor(qweight, scale, torch.float32)
        for expert in range(experts.num_experts):
            crossed = expand_rows(*operator_rows(qweight[expert], scale[expert], -1, num_bits)).T
            expected_signal += weight[expert].square().sum().item()
            expected_noise += (weight[expert] - crossed).square().sum().item()
    assert signal == pytest.approx(expected_signal)
    assert noise == pytest.approx(expected_noise)
    assert 10 * np.log10(signal / noise) > at_least_db
    read, read_scale = unpack_universal(gate_up[2].numpy(), 64, 64, 32, num_bits)
    rows, scale = operator_rows(experts.gate_up_qweight[2], experts.gate_up_scale[2], -1, num_bits)
    assert np.array_equal(read, rows.numpy()) and np.array_equal(read_scale, scale.numpy())
