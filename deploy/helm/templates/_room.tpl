{{- /*
Replicas that find no room would wait for ever, without an error: what can't be is refused here.
Ray counts a pod's CPUs and GPUs by its limits, and rounds them up.
*/ -}}
{{- define "backpack.room" -}}
{{- $workers := .workers }}
{{- if gt (int $workers.min) (int $workers.max) }}
{{- fail (printf "inference.workers: min (%v) is more than max (%v)" $workers.min $workers.max) }}
{{- end }}
{{- $limits := $workers.resources.limits | default dict }}
{{- $cpu := toString ($limits.cpu | default 0) }}
{{- $cpus := hasSuffix "m" $cpu | ternary (divf (trimSuffix "m" $cpu | float64) 1000) (float64 $cpu) | ceil }}
{{- $gpus := 0.0 }}
{{- range $name, $count := $limits }}{{ if hasSuffix "gpu" $name }}{{ $gpus = float64 $count }}{{ end }}{{ end }}
{{- $each := .arguments }}
{{- $fit := 1000000.0 }}
{{- if gt (float64 $each.cpus) 0.0 }}{{ $fit = divf $cpus $each.cpus | floor }}{{ end }}
{{- if gt (float64 $each.gpus) 0.0 }}{{ $fit = minf $fit (divf $gpus $each.gpus | floor) }}{{ end }}
{{- if lt (float64 $fit) 1.0 }}
{{- fail (printf "inference: a replica (arguments: cpus %v, gpus %v) doesn't fit into a pod (workers.resources.limits: %v CPUs, %v GPUs)" $each.cpus $each.gpus $cpus $gpus) }}
{{- end }}
{{- $wanted := $each.count }}
{{- with $each.autoscaling }}
{{- $wanted = .max_replicas }}
{{- if gt (int .min_replicas) (int .max_replicas) }}
{{- fail (printf "inference.arguments.autoscaling: min_replicas (%v) is more than max_replicas (%v)" .min_replicas .max_replicas) }}
{{- end }}
{{- end }}
{{- $room := mulf $fit $workers.max }}
{{- if gt (float64 $wanted) (float64 $room) }}
{{- fail (printf "inference: %v replicas don't fit into workers.max (%v) pods, which hold %v each" $wanted $workers.max $fit) }}
{{- end }}
{{- end }}
