"""Device code of ROI-align.

Dimension key: B = images, R = boxes of all images, N = tokens of a sequence, h, w = rows and
columns of the image's token grid, p, q = those of the output grid, C = channels. Rows and columns
share a table: the part of the rows comes first.
"""

import triton
import triton.language as tl

from kernels.precision import SHORTEST_NORM

SHORTEST: tl.constexpr = tl.constexpr(SHORTEST_NORM)


# Not specialised: a grid or a number of boxes that is new must not wait for a compile.
@triton.jit(do_not_specialize=["num_images", "height", "width", "rows", "columns"])
def tables_kernel(
    boxes_ptr,  # [R, 4] float32
    first_box_ptr,  # [B + 1] int32
    weights_ptr,  # [R, p * h + q * w] float32: how much a cell counts in a bin
    cells_ptr,  # [R, p + q, 2] int32: first cell of a bin, one past its last
    bins_ptr,  # [R, h + w, 2] int32: first bin of a cell, one past its last
    image_ptr,  # [R] int32
    num_images,
    height,
    width,
    rows,
    columns,
    BLOCK_IMAGES: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
):
    """Program (box, axis): what `axis_weights` computes, and where it is not zero."""
    roi = tl.program_id(0).to(tl.int64)
    axis = tl.program_id(1)  # 0: rows, 1: columns
    num_cells = tl.where(axis == 0, height, width)
    num_bins = tl.where(axis == 0, rows, columns)
    weights_ptr += roi * (rows * height + columns * width) + axis * rows * height
    cells_ptr += (roi * (rows + columns) + axis * rows) * 2
    bins_ptr += (roi * (height + width) + axis * height) * 2

    images = tl.arange(0, BLOCK_IMAGES)
    ends = tl.load(first_box_ptr + 1 + images, mask=images < num_images, other=2147483647)
    tl.store(image_ptr + roi, tl.sum((ends <= roi).to(tl.int32), axis=0))

    last_cell = num_cells.to(tl.float32) - 1
    start = tl.load(boxes_ptr + roi * 4 + 1 - axis) * num_cells.to(tl.float32) - 0.5
    end = tl.load(boxes_ptr + roi * 4 + 3 - axis) * num_cells.to(tl.float32) - 0.5
    bin_size = tl.div_rn(end - start, num_bins.to(tl.float32))
    num_samples = tl.maximum(tl.ceil(bin_size), 0.0)
    divisor = tl.maximum(num_samples, 1.0)
    step = tl.div_rn(bin_size, divisor)
    divisible_step = tl.where(num_samples > 0, step, 1.0)
    # Steps are longer than half a cell where there are several, so that no more than this many
    # samples of a bin lie between the rims, however large the box.
    num_tried = tl.minimum(num_samples, 2 * last_cell + 8).to(tl.int32)

    cells = tl.arange(0, BLOCK_CELLS)
    first_bin = tl.full([BLOCK_CELLS], 2147483647, tl.int32)
    end_bin = tl.zeros([BLOCK_CELLS], tl.int32)
    for block in range(0, num_bins, BLOCK_BINS):
        bins = block + tl.arange(0, BLOCK_BINS)
        bin_start = start + bins.to(tl.float32) * bin_size
        first_sample = tl.maximum(tl.floor((-1 - bin_start) / divisible_step) - 1, 0.0)
        weights = tl.zeros([BLOCK_BINS, BLOCK_CELLS], tl.float32)
        for tried in range(num_tried):
            sample = first_sample + tried
            position = bin_start + (sample + 0.5) * step
            is_counted = (position >= -1) & (position <= last_cell + 1) & (sample < num_samples)
            position = tl.minimum(tl.maximum(position, 0.0), last_cell)
            hat = 1 - tl.abs(position[:, None] - cells[None, :].to(tl.float32))
            weights += tl.where(is_counted[:, None], tl.maximum(hat, 0.0), 0.0)
        weights = tl.div_rn(weights, tl.zeros_like(weights) + divisor)

        is_inside = (bins < num_bins)[:, None] & (cells < num_cells)[None, :]
        offsets = bins[:, None] * num_cells + cells[None, :]
        tl.store(weights_ptr + offsets, weights, mask=is_inside)
        is_touched = is_inside & (weights > 0)
        of_bin, is_bin = cells_ptr + bins * 2, bins < num_bins
        first_cell = tl.where(is_touched, cells[None, :], 2147483647)
        last_touched = tl.where(is_touched, cells[None, :], -1)
        tl.store(of_bin, tl.min(first_cell, axis=1), mask=is_bin)
        tl.store(of_bin + 1, tl.max(last_touched, axis=1) + 1, mask=is_bin)
        first = tl.where(is_touched, bins[:, None], 2147483647)
        last = tl.where(is_touched, bins[:, None], -1)
        first_bin = tl.minimum(first_bin, tl.min(first, axis=0))
        end_bin = tl.maximum(end_bin, tl.max(last, axis=0) + 1)
    tl.store(bins_ptr + cells * 2, first_bin, mask=cells < num_cells)
    tl.store(bins_ptr + cells * 2 + 1, end_bin, mask=cells < num_cells)


@triton.jit(do_not_specialize=["first_token", "canvas_width", "height", "width", "rows", "columns"])
def forward_kernel(
    tokens_ptr,  # [B, N, C]
    weights_ptr,  # [R, p * h + q * w] float32
    cells_ptr,  # [R, p + q, 2] int32
    image_ptr,  # [R] int32
    rois_ptr,  # [R, p * q, C], contiguous
    norms_ptr,  # [R, p * q] float32, or nothing without NORMALIZE
    stride_b,
    stride_n,
    stride_c,
    first_token,  # that of cell (0, 0)
    canvas_width,
    height,
    width,
    rows,
    columns,
    NUM_CHANNELS: tl.constexpr,
    BLOCK_C0: tl.constexpr,
    BLOCK_C1: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Program: NUM_BINS neighbouring bins of a box's row, all channels."""
    blocks = tl.cdiv(columns, NUM_BINS)
    program = tl.program_id(0)
    roi = (program // (blocks * rows)).to(tl.int64)
    row = program // blocks % rows
    first_column = program % blocks * NUM_BINS

    image_offset = tl.load(image_ptr + roi).to(tl.int64) * stride_b
    if ALIGNED:
        image_offset = tl.multiple_of(image_offset, 8)
    tokens_ptr += image_offset
    weights_ptr += roi * (rows * height + columns * width)
    cells_ptr += roi * (rows + columns) * 2
    first_y = tl.load(cells_ptr + row * 2)
    end_y = tl.load(cells_ptr + row * 2 + 1)
    weights_y_ptr = weights_ptr + row * height
    c0 = tl.arange(0, BLOCK_C0)
    is_c0 = c0 < NUM_CHANNELS
    if BLOCK_C1 > 0:
        c1 = BLOCK_C0 + tl.arange(0, BLOCK_C1)
        is_c1 = c1 < NUM_CHANNELS

    for column in range(first_column, tl.minimum(first_column + NUM_BINS, columns)):
        first_x = tl.load(cells_ptr + (rows + column) * 2)
        end_x = tl.load(cells_ptr + (rows + column) * 2 + 1)
        weights_x_ptr = weights_ptr + rows * height + column * width
        sum0 = tl.zeros([BLOCK_C0], tl.float32)
        if BLOCK_C1 > 0:
            sum1 = tl.zeros([BLOCK_C1], tl.float32)
        for y in range(first_y, end_y):
            weight_y = tl.load(weights_y_ptr + y)
            for block in range(first_x, end_x, UNROLL):
                for i in tl.static_range(UNROLL):
                    x = block + i
                    channels = tl.where(x < end_x, NUM_CHANNELS, 0)
                    weight = weight_y * tl.load(weights_x_ptr + x, mask=x < end_x, other=0.0)
                    token = tl.cast(first_token + y * canvas_width + x, tl.int64)
                    offset = token * stride_n
                    if ALIGNED:
                        offset = tl.multiple_of(offset, 8)
                    cell_ptr = tokens_ptr + offset
                    cell0 = tl.load(cell_ptr + c0 * stride_c, mask=c0 < channels, other=0.0)
                    sum0 += weight * cell0.to(tl.float32)
                    if BLOCK_C1 > 0:
                        cell1 = tl.load(cell_ptr + c1 * stride_c, mask=c1 < channels, other=0.0)
                        sum1 += weight * cell1.to(tl.float32)

        bin = (roi * rows + row) * columns + column
        if NORMALIZE:
            square = tl.sum(sum0 * sum0, axis=0)
            if BLOCK_C1 > 0:
                square += tl.sum(sum1 * sum1, axis=0)
            norm = tl.sqrt_rn(square)
            tl.store(norms_ptr + bin, norm)
            scale = tl.div_rn(1.0, tl.maximum(norm, SHORTEST))
            sum0 *= scale
            if BLOCK_C1 > 0:
                sum1 *= scale
        roi_ptr = rois_ptr + bin * NUM_CHANNELS
        tl.store(roi_ptr + c0, sum0.to(rois_ptr.dtype.element_ty), mask=is_c0)
        if BLOCK_C1 > 0:
            tl.store(roi_ptr + c1, sum1.to(rois_ptr.dtype.element_ty), mask=is_c1)


@triton.jit(
    do_not_specialize=["prefix", "border", "num_tokens", "height", "width", "rows", "columns"]
)
def backward_kernel(
    gradient_ptr,  # [R, p * q, C]
    weights_ptr,  # [R, p * h + q * w] float32
    bins_ptr,  # [R, h + w, 2] int32
    first_box_ptr,  # [B + 1] int32
    token_gradient_ptr,  # [B, N, C], contiguous
    stride_r,
    stride_p,
    stride_c,
    prefix,
    border,
    num_tokens,
    height,
    width,
    rows,
    columns,
    NUM_CHANNELS: tl.constexpr,
    BLOCK_C0: tl.constexpr,
    BLOCK_C1: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Program: a token, all channels; it gathers from its image's boxes, always in their order."""
    program = tl.program_id(0)
    image = program // num_tokens
    token = program % num_tokens
    canvas_width = width + 2 * border
    y = (token - prefix) // canvas_width - border
    x = (token - prefix) % canvas_width - border
    is_inside = (token >= prefix) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    first_roi = tl.load(first_box_ptr + image)
    end_roi = tl.load(first_box_ptr + image + 1)
    end_roi = tl.where(is_inside, end_roi, first_roi)

    c0 = tl.arange(0, BLOCK_C0)
    is_c0 = c0 < NUM_CHANNELS
    sum0 = tl.zeros([BLOCK_C0], tl.float32)
    if BLOCK_C1 > 0:
        c1 = BLOCK_C0 + tl.arange(0, BLOCK_C1)
        is_c1 = c1 < NUM_CHANNELS
        sum1 = tl.zeros([BLOCK_C1], tl.float32)

    for index in range(first_roi, end_roi):
        roi = tl.cast(index, tl.int64)
        roi_bins_ptr = bins_ptr + roi * (height + width) * 2
        first_row = tl.load(roi_bins_ptr + y * 2)
        end_row = tl.load(roi_bins_ptr + y * 2 + 1)
        first_column = tl.load(roi_bins_ptr + (height + x) * 2)
        end_column = tl.load(roi_bins_ptr + (height + x) * 2 + 1)
        end_row = tl.where(first_column < end_column, end_row, first_row)
        roi_weights_ptr = weights_ptr + roi * (rows * height + columns * width)
        weights_x_ptr = roi_weights_ptr + rows * height + x
        for row in range(first_row, end_row):
            weight_y = tl.load(roi_weights_ptr + row * height + y)
            for block in range(first_column, end_column, UNROLL):
                for i in tl.static_range(UNROLL):
                    column = block + i
                    is_bin = column < end_column
                    channels = tl.where(is_bin, NUM_CHANNELS, 0)
                    weight_x = tl.load(weights_x_ptr + column * width, mask=is_bin, other=0.0)
                    weight = weight_y * weight_x
                    bin = tl.cast(row * columns + column, tl.int64)
                    offset = roi * stride_r + bin * stride_p
                    if ALIGNED:
                        offset = tl.multiple_of(offset, 8)
                    bin_ptr = gradient_ptr + offset
                    bin0 = tl.load(bin_ptr + c0 * stride_c, mask=c0 < channels, other=0.0)
                    sum0 += weight * bin0.to(tl.float32)
                    if BLOCK_C1 > 0:
                        bin1 = tl.load(bin_ptr + c1 * stride_c, mask=c1 < channels, other=0.0)
                        sum1 += weight * bin1.to(tl.float32)

    token_ptr = token_gradient_ptr + program.to(tl.int64) * NUM_CHANNELS
    tl.store(token_ptr + c0, sum0.to(token_gradient_ptr.dtype.element_ty), mask=is_c0)
    if BLOCK_C1 > 0:
        tl.store(token_ptr + c1, sum1.to(token_gradient_ptr.dtype.element_ty), mask=is_c1)


@triton.jit
def normalize_backward_kernel(
    gradient_ptr,  # [R, p * q, C]
    units_ptr,  # [R, p * q, C], contiguous
    norms_ptr,  # [R, p * q] float32
    result_ptr,  # [R, p * q, C] float32, contiguous
    stride_r,
    stride_p,
    stride_c,
    num_bins,
    NUM_CHANNELS: tl.constexpr,
    BLOCK_C0: tl.constexpr,
    BLOCK_C1: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Program: one vector, its gradient before it was scaled to unit length."""
    program = tl.program_id(0).to(tl.int64)
    offset = program // num_bins * stride_r + program % num_bins * stride_p
    if ALIGNED:
        offset = tl.multiple_of(offset, 8)
    gradient_ptr += offset
    units_ptr += program * NUM_CHANNELS
    result_ptr += program * NUM_CHANNELS

    c0 = tl.arange(0, BLOCK_C0)
    is_c0 = c0 < NUM_CHANNELS
    gradient0 = tl.load(gradient_ptr + c0 * stride_c, mask=is_c0, other=0.0).to(tl.float32)
    unit0 = tl.load(units_ptr + c0, mask=is_c0, other=0.0).to(tl.float32)
    radial = tl.sum(gradient0 * unit0, axis=0)
    if BLOCK_C1 > 0:
        c1 = BLOCK_C0 + tl.arange(0, BLOCK_C1)
        is_c1 = c1 < NUM_CHANNELS
        gradient1 = tl.load(gradient_ptr + c1 * stride_c, mask=is_c1, other=0.0).to(tl.float32)
        unit1 = tl.load(units_ptr + c1, mask=is_c1, other=0.0).to(tl.float32)
        radial += tl.sum(gradient1 * unit1, axis=0)

    norm = tl.load(norms_ptr + program)
    radial = tl.where(norm >= SHORTEST, radial, 0.0)
    scale = tl.div_rn(1.0, tl.maximum(norm, SHORTEST))
    tl.store(result_ptr + c0, (gradient0 - radial * unit0) * scale, mask=is_c0)
    if BLOCK_C1 > 0:
        tl.store(result_ptr + c1, (gradient1 - radial * unit1) * scale, mask=is_c1)
