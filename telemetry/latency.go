package telemetry

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/instrumentation"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/kvshield/kvshield/telemetry/live"
)

// latency is the histogram of transitions, as hooks have counted it.
type latency struct {
	engine Counter
	mode   string
	began  time.Time
}

// Produce implements the SDK's Producer.
func (l *latency) Produce(context.Context) ([]metricdata.ScopeMetrics, error) {
	totals := l.engine.Totals()
	point := metricdata.HistogramDataPoint[float64]{Attributes: attribute.NewSet(keyMode.String(l.mode)), StartTime: l.began, Time: time.Now(), Sum: totals.Wait.Seconds()}
	point.Bounds, point.BucketCounts = live.Fold(&totals.Histogram)
	for _, n := range point.BucketCounts {
		point.Count += n
	}
	if point.Count == 0 && totals.Transitions > 0 {
		return nil, nil // an engine whose hook somebody else reads
	}
	return []metricdata.ScopeMetrics{{Scope: instrumentation.Scope{Name: scope}, Metrics: []metricdata.Metrics{{
		Name: "kvshield.transition.duration", Unit: "s", Description: "What a transition took, from before its rows leave the engine's buffer until the answer is back.",
		Data: metricdata.Histogram[float64]{Temporality: metricdata.CumulativeTemporality, DataPoints: []metricdata.HistogramDataPoint[float64]{point}},
	}}}}, nil
}
