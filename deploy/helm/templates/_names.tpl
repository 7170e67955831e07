{{- /* The release's name is the prefix of every object's. */ -}}
{{- define "backpack.name" -}}{{ printf "%s-%s" .root.Release.Name .part | trunc 60 | trimSuffix "-" }}{{- end }}

{{- define "backpack.selector" -}}
app.kubernetes.io/name: backpack
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "backpack.labels" -}}
{{ include "backpack.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "backpack.image" -}}
{{ .root.Values.image.registry }}backpack-{{ .part }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "backpack.pullSecrets" -}}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: [{{ range $i, $name := . }}{{ if $i }}, {{ end }}{name: {{ $name }}}{{ end }}]
{{- end }}
{{- end }}

{{- define "backpack.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "backpack.security" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}

{{- /* Environment of one process: what the chart decides, then the operator's settings, then secrets by reference. */ -}}
{{- define "backpack.environment" -}}
{{- $own := .own | default dict }}
{{- range $name, $value := merge (deepCopy $own) .root.Values.settings }}
- {name: BACKPACK_{{ $name | upper }}, value: {{ $value | toString | quote }}}
{{- end }}
{{- if .root.Values.model.claim }}
- {name: BACKPACK_MODEL, value: {{ printf "/models/%s" .root.Values.model.path | trimSuffix "/" | quote }}}
{{- end }}
{{- range $setting, $key := .secrets }}
- name: {{ $setting }}
  valueFrom: {secretKeyRef: {name: {{ $.root.Values.secret }}, key: {{ $key }}}}
{{- end }}
{{- end }}

{{- define "backpack.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: state, mountPath: /var/lib/backpack}
{{- if .root.Values.model.claim }}
- {name: model, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}

{{- define "backpack.volumes" -}}
- {name: tmp, emptyDir: {}}
- {name: state, emptyDir: {}}
{{- if .root.Values.model.claim }}
- name: model
  persistentVolumeClaim: {claimName: {{ .root.Values.model.claim }}, readOnly: true}
{{- end }}
{{- end }}

{{- define "backpack.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- end }}

{{- define "backpack.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "backpack.selector" . | nindent 8 }}
{{- end }}
