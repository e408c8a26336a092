/*
 * The frequency factors of a permuted rotary embedding. Place j turns by angle(j)/factor and must turn by the angle of the pair that
 * stands there; a swapped pair turns backwards. Angles are those of ggml's ROPE: powers of a step, and with YaRN (ggml.h,
 * ggml_rope_ext; arXiv 2309.00071, section 3.2) a blend of stretched and plain ones that depends on the place.
 */
#include "kvs.h"

#include <math.h>

/* The place at which a pair turns `rotations` times over the original context. In F32, because its rounding decides. */
static float place_of(const struct kvs_rope *r, float rotations)
{
    return (float)r->dims * logf((float)r->original / (rotations * 2.0f * (float)M_PI)) / (2.0f * logf(r->base));
}

/* How much of a frequency is left at a place: all, the stretched part, or between. */
static double kept(const struct kvs_rope *r, unsigned place)
{
    if (r->ext_factor == 0.0f)
        return 1.0; /* the same at all places */
    float low = fmaxf(0.0f, floorf(place_of(r, r->beta_fast)));
    float high = fminf((float)r->dims - 1.0f, ceilf(place_of(r, r->beta_slow)));
    float along = ((float)place - low) / fmaxf(0.001f, high - low);
    float ramp = (1.0f - fminf(1.0f, fmaxf(0.0f, along))) * r->ext_factor;
    return (double)r->scale * (1.0 - (double)ramp) + (double)ramp;
}

bool kvs_rotary_factors(const struct kvs_rope *r, const uint16_t *pairs, size_t n, const float *own, float *out)
{
    /* Engines multiply with this F32 step again and again: its exact powers are what their products scatter around. */
    double step = (double)(float)pow((double)r->base, (double)(-2.0f / (float)r->dims));
    for (size_t j = 0; j < n; j++) {
        unsigned pair = pairs[j] >> 1;
        if (pair >= n)
            return false;
        double f = pow(step, (double)j - (double)pair) * kept(r, (unsigned)j) / kept(r, pair);
        if (own)
            f *= (double)own[pair];
        out[j] = (float)(pairs[j] & 1 ? -f : f);
        if (!isnormal(out[j]))
            return false;
    }
    return true;
}
